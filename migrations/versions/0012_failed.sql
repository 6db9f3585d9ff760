-- Dead letters are counted by class without a look at their rows: both indexes hold what that takes, and only what
-- failed has an entry.

drop index items_failed;
create index items_failed on items (workspace_id, resource_id, ended_at) include (batch_day, batch_id, seq)
    where status = 'failed';
create index item_results_failed on item_results (workspace_id, batch_id, seq)
    include (batch_day, error_code, status_code)
    where error_code is not null;
