-- Worker processes. They work for all workspaces, so only operators see them.
create or replace view report.workers with (security_barrier) as
select k.worker_id,
    k.host,
    k.pid,
    k.version,
    k.started_at,
    k.heartbeat_at as seen_at,
    round(extract(epoch from clock() - k.heartbeat_at), 3) as silent_s,
    case when k.stopped_at is not null then 'stopped' when k.died_at is not null then 'dead' else 'running' end as state,
    k.stopped_at,
    k.in_flight as in_flight_calls
from report_operators o
cross join workers k;

comment on view report.workers is
    'Workers: last seen, in flight. Only for logins that see all workspaces.';
comment on column report.workers.worker_id is 'One life of a process.';
comment on column report.workers.host is 'Where it runs.';
comment on column report.workers.pid is 'Its process id there.';
comment on column report.workers.version is 'Its version of Sluice.';
comment on column report.workers.started_at is 'When it began.';
comment on column report.workers.seen_at is 'When it was last heard of.';
comment on column report.workers.silent_s is 'The same as an age.';
comment on column report.workers.state is 'running, stopped, or dead: its own host found it gone.';
comment on column report.workers.stopped_at is 'When it said goodbye.';
comment on column report.workers.in_flight_calls is 'Calls it had out when it was last heard of.';
