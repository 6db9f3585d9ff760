-- Quotas of a workspace.

-- name: quota_use
-- What waits in the queue and the workspace's own quotas, locked against other creations: see sql/functions/quota.sql.
select items, batches, bytes, quota_items, quota_batches, quota_bytes
from quota_use(%(workspace_id)s);

-- name: quota_look
-- The same without a lock, for a refusal before anything was written.
select coalesce(sum(f.pending + f.running), 0)::bigint as items, count(distinct f.batch_id) as batches,
    coalesce(sum(f.request_bytes), 0)::bigint as bytes, w.quota_items, w.quota_batches, w.quota_bytes
from workspaces w
left join flows f on f.workspace_id = w.workspace_id and f.is_open
where w.workspace_id = %(workspace_id)s
group by w.workspace_id;
