-- Alternates of resources (fallbacks, secondary models, targets of routing rules), and who made what.

-- What calls a type that changes is replaced after this revision.
alter type settled_item add attribute moves_to uuid;

alter table connections add column created_by uuid;
alter table connections add column updated_by uuid;
alter table resources add column owner_id uuid;
alter table resources add column use_fallback boolean not null default true;
alter table resources add column fallback_ids uuid[] not null default '{}';
alter table resources add column fallback_on jsonb not null default '{}';
alter table resources add column secondary_ids uuid[] not null default '{}';
alter table resources add column routing jsonb;
alter table resources add column created_by uuid;
alter table resources add column updated_by uuid;
alter table resources add constraint resources_owner_fkey foreign key (workspace_id, owner_id)
    references resources on delete cascade;
alter table resources add constraint resources_alternates_have_none check (
    owner_id is null or (fallback_ids = '{}' and secondary_ids = '{}' and routing is null)
);

-- Alternates have names for people only.
alter table resources drop constraint resources_name_unique;
create unique index resources_name_unique on resources (workspace_id, environment_id, name)
    where owner_id is null;
create unique index resources_alternate_unique on resources (workspace_id, owner_id, connection_id, model)
    where owner_id is not null;

comment on type settled_item is
    'Scratch of settle(), reclaim() and expire(): one transition; moves_to: the resource that is asked next, '
    'if another one. Never stored.';
comment on column connections.created_by is 'The user or key that made it; null: the command line.';
comment on column connections.updated_by is 'The user or key that last changed it; null: nobody, or the command line.';
comment on table resources is
    'A named model on a connection. Items name a resource. A resource''s other models (fallbacks, secondary '
    'models, targets of its routing rules) are rows too, its alternates, so that each is claimed, limited and '
    'counted like any other; nobody names those.';
comment on column resources.owner_id is 'The resource whose alternate this is; null: people made it.';
comment on column resources.use_fallback is 'Whether its fallbacks are taken.';
comment on column resources.fallback_ids is 'The alternates to ask where this one cannot answer, in order.';
comment on column resources.fallback_on is 'After which outcomes, as the wire gave it; see fallback_of().';
comment on column resources.secondary_ids is 'The alternates that a request may choose by their position.';
comment on column resources.routing is 'Rules that choose an alternate, or refuse, as items are created.';
comment on column resources.created_by is 'The user or key that made it; null: the command line.';
comment on column resources.updated_by is 'The user or key that last changed it; null: nobody, or the command line.';
