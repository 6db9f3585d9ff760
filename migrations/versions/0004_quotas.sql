-- Quotas of a workspace: what of it may wait in the queue. Flows know how large their requests are.
alter table workspaces
    add column quota_items bigint,
    add column quota_batches bigint,
    add column quota_bytes bigint,
    add constraint workspaces_quotas_not_negative check (least(quota_items, quota_batches, quota_bytes) >= 0);
comment on column workspaces.quota_items is
    'Most items that have not ended; 0: any number, null: what SLUICE_QUOTA_ITEMS says.';
comment on column workspaces.quota_batches is
    'Most batches that have not ended; 0: any number, null: what SLUICE_QUOTA_BATCHES says.';
comment on column workspaces.quota_bytes is
    'Most bytes of their requests; 0: any number, null: what SLUICE_QUOTA_BYTES says.';

-- Batches that are open now count without their bytes until they end.
alter table flows add column request_bytes bigint not null default 0;
comment on column flows.request_bytes is 'Size of its requests as they were submitted.';
