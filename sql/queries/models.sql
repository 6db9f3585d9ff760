-- What a request's model names.

-- name: model_resources
-- The resource that each of these names means: the one of that name, else the oldest whose model it is, preferring
-- those that the caller may use.
select distinct on (g.name) g.name, r.resource_id
from unnest(%(names)s::text[]) as g (name)
join resources r on r.workspace_id = %(workspace_id)s
    and r.environment_id = %(environment_id)s
    and r.owner_id is null
    and (r.name = g.name or r.model = g.name)
order by g.name, r.name = g.name desc,
    (%(resource_ids)s::uuid[] is null or r.resource_id = any (%(resource_ids)s::uuid[])) desc, r.resource_id;

-- name: model_connection
-- The oldest connection that lists a model as allowed.
select connection_id
from connections
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and %(model)s = any (allowed_models)
order by connection_id
limit 1;
