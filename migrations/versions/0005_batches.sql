-- Batches completed: calls cut by a cancel, chosen items tried again, time limits of a batch's own, usage by time.

-- Functions whose arguments or rows change; the new ones are applied after this revision.
drop function if exists claim(uuid, uuid, uuid, int, boolean, interval, interval, double precision, int);
drop function if exists cancel(uuid, uuid);
drop function if exists redrive(uuid, uuid, int);

alter type taken_item add attribute timeout_ms int;

alter table batches
    add column timeout_ms int,
    add column max_attempts smallint,
    add constraint batches_timeout_positive check (timeout_ms > 0),
    add constraint batches_max_attempts_positive check (max_attempts > 0);
comment on column batches.timeout_ms is
    'Longest time of one call as its creator wanted it, in milliseconds; null: that of the resource.';
comment on column batches.max_attempts is 'Failures before an item fails, as its creator wanted it; null: the usual.';

alter table flows
    add column is_aborted boolean not null default false,
    add constraint flows_aborted_are_cancelled check (is_cancelled or not is_aborted);
comment on column flows.is_aborted is 'Cancelled with all its calls: workers cut those in flight.';

alter table items
    add column timeout_ms int,
    add constraint items_timeout_positive check (timeout_ms > 0);
comment on column items.timeout_ms is 'Longest time of one call, in milliseconds; null: that of the resource.';

alter table item_requests add column vmx jsonb;
comment on column item_requests.vmx is
    'The body''s member of that name, which is for Sluice and not sent on; null: it has none.';

-- Small enough to cost the writers nothing: attempts are appended in the order of their ends.
create index attempts_by_time on attempts using brin (ended_at) with (pages_per_range = 32);
