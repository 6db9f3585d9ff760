-- Whose rows a reader sees. Every view of schema report begins here, and no reader may read this file's views.
--
-- session_user, not current_user: SET ROLE does not change it. A login without a row in report_grants sees nothing,
-- whatever roles it was given; the owner of this database's tables (and a superuser) sees all. No function that
-- reads a table is called in any view: it would run with the reader's own rights and search_path.
create schema if not exists report;
comment on schema report is
    'What analysts may rely on: views whose columns are only ever added to. See docs/reporting.md.';

create or replace view report_tenants as
select w.workspace_id, w.name
from workspaces w
where exists (
    select from report_grants g
    where g.role_name = session_user and (g.workspace_id is null or g.workspace_id = w.workspace_id)
)
or pg_has_role(session_user, (select c.relowner from pg_class c where c.oid = 'workspaces'::regclass), 'member');
comment on view report_tenants is 'The workspaces whose rows the present login sees in reports.';
comment on column report_tenants.workspace_id is 'The tenant.';
comment on column report_tenants.name is 'The tenant''s name.';

create or replace view report_operators as
select session_user::text as role_name
where exists (
    select from report_grants g where g.role_name = session_user and g.workspace_id is null
)
or pg_has_role(session_user, (select c.relowner from pg_class c where c.oid = 'workspaces'::regclass), 'member');
comment on view report_operators is 'The present login, if it sees all workspaces: what concerns none is for it.';
comment on column report_operators.role_name is 'The login.';

create or replace view report_text_readers as
select session_user::text as role_name
where exists (select from report_grants g where g.role_name = session_user and g.with_texts)
or pg_has_role(session_user, (select c.relowner from pg_class c where c.oid = 'workspaces'::regclass), 'member');
comment on view report_text_readers is 'The present login, if it may read prompts and answers.';
comment on column report_text_readers.role_name is 'The login.';
