-- What of a workspace waits in the queue, for whoever is about to add to it. Locks the workspace's row until the
-- commit, so that of two creations the second sees the first; then looks, in a statement of its own, which sees
-- what was committed meanwhile (and what the caller has written itself). Only creations lock that row, as the last
-- lock before ready: they hold it for their final statements, not while they write their items.
create or replace function quota_use(p_workspace_id uuid)
returns table (
    items bigint, batches bigint, bytes bigint, quota_items bigint, quota_batches bigint, quota_bytes bigint
)
language plpgsql volatile
as $$
begin
    perform 1 from workspaces w where w.workspace_id = p_workspace_id for no key update;
    return query
    select u.items, u.batches, u.bytes, w.quota_items, w.quota_batches, w.quota_bytes
    from workspaces w
    cross join lateral (
        select coalesce(sum(f.pending + f.running), 0)::bigint as items,
            count(distinct f.batch_id) as batches,
            coalesce(sum(f.request_bytes), 0)::bigint as bytes
        from flows f
        where f.workspace_id = w.workspace_id and f.is_open
    ) u
    where w.workspace_id = p_workspace_id;
end
$$;
comment on function quota_use(uuid) is
    'Lock a workspace against other creations; what of it waits, and the quotas it has of its own.';
