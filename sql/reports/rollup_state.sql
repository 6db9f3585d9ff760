-- How far the rollups are behind.
create or replace view report.rollup_state with (security_barrier) as
select count(distinct d.minute_at) as due_minutes,
    min(d.minute_at) as oldest_due_at,
    (select max(m.minute_at) from rollup_minutes m) as newest_at
from report_operators o
left join rollup_due d on true
group by o.role_name;

comment on view report.rollup_state is
    'How far behind the rollups are: nothing due means that they are exact.';
comment on column report.rollup_state.due_minutes is 'Minutes that will be counted anew.';
comment on column report.rollup_state.oldest_due_at is 'The oldest of them.';
comment on column report.rollup_state.newest_at is 'The newest minute that was counted.';
