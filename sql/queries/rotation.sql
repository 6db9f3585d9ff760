-- Sealed secrets, of every tenant: an operator's statements.

-- name: connection_secrets_of_other_keys
-- Some secrets of connections that another key than the given one sealed. Locks their rows in order.
select workspace_id, connection_id as id, 'connection ''' || name || '''' as owner, connection_id::text as context,
    secret_key_id, secret
from connections
where secret is not null
    and secret_key_id <> %(key_id)s
    and (workspace_id, connection_id) > (%(after_workspace_id)s::uuid, %(after_id)s::uuid)
order by workspace_id, connection_id
limit %(most)s
for no key update;

-- name: endpoint_secrets_of_other_keys
-- The same of callbacks and webhooks.
select workspace_id, endpoint_id as id, case when batch_id is null then 'webhook endpoint' else 'callback of batch' end
    as owner, 'endpoint:' || endpoint_id as context, secret_key_id, secret
from endpoints
where secret_key_id <> %(key_id)s
    and (workspace_id, endpoint_id) > (%(after_workspace_id)s::uuid, %(after_id)s::uuid)
order by workspace_id, endpoint_id
limit %(most)s
for no key update;

-- name: connection_reseal
-- The same secret under another key: nothing that anybody sees has changed.
update connections
set secret_key_id = %(secret_key_id)s, secret = %(secret)s
where workspace_id = %(workspace_id)s and connection_id = %(id)s;

-- name: endpoint_reseal
-- The same of a callback or webhook.
update endpoints
set secret_key_id = %(secret_key_id)s, secret = %(secret)s
where workspace_id = %(workspace_id)s and endpoint_id = %(id)s;

-- name: secrets_by_key
-- How many secrets each key has sealed.
select secret_key_id, count(*) as secrets
from (
    select secret_key_id from connections where secret is not null
    union all
    select secret_key_id from endpoints
) s
group by secret_key_id
order by secret_key_id;

-- name: secrets_stored
-- Every sealed secret, to see whether the configured keys open it.
select workspace_id, connection_id as id, 'connection ''' || name || '''' as owner, connection_id::text as context,
    secret_key_id, secret
from connections
where secret is not null
union all
select workspace_id, endpoint_id, case when batch_id is null then 'webhook endpoint' else 'callback of batch' end,
    'endpoint:' || endpoint_id, secret_key_id, secret
from endpoints
order by workspace_id, id;
