-- Reports: the views as the catalog knows them, the rollups, and who may read. The views are in sql/reports/.

-- name: report_columns
-- Every column of every reporting view, with its type and what it says.
select c.relname::text as view, obj_description(c.oid, 'pg_class') as about, a.attname::text as column,
    format_type(a.atttypid, a.atttypmod) as type, col_description(c.oid, a.attnum) as column_about
from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
where c.relnamespace = 'report'::regnamespace and c.relkind = 'v'
order by c.relname, a.attnum;

-- name: rollup_some
-- Count some minutes anew whose attempts have changed; how many.
select rollup_some(%(most)s) as minutes;

-- name: report_readers
-- The backends of logins that may read reports, and the parallel workers of their queries.
select a.pid
from pg_stat_activity a
join report_grants g on g.role_name = a.usename;

-- name: report_role
-- A role, and whether it would see everything anyway.
select r.rolname::text as name, r.rolcanlogin as can_login,
    r.rolsuper or pg_has_role(r.oid, (select c.relowner from pg_class c where c.oid = 'workspaces'::regclass), 'member')
        as sees_everything
from pg_roles r
where r.rolname = %(name)s;

-- name: report_grant_put
-- Whose rows a login sees.
insert into report_grants (role_name, workspace_id, with_texts)
values (%(role_name)s, %(workspace_id)s, %(with_texts)s)
on conflict (role_name) do update
set workspace_id = excluded.workspace_id, with_texts = excluded.with_texts;

-- name: report_grant_delete
-- A login sees nothing any more.
delete from report_grants where role_name = %(role_name)s;
