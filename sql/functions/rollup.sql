-- Rollups: attempts counted by minute and by hour, for reports that outlive them.
--
-- A minute is never added to: it is counted anew from its attempts whenever one of them was written or corrected
-- (rollup_due), so doing it twice changes nothing, and a correction that comes hours later is included. Minutes are
-- kept per partition (batch_day), so that counting one reads one partition, by the BRIN index on ended_at, and
-- a minute whose partition was dropped keeps what it had. Only one process does this (maintenance).

-- The bucket of a duration: each is a tenth longer than the one before, so a percentile read from them is at most a
-- tenth too high. The last one, 219, begins at about thirteen days.
create or replace function duration_bucket(ms double precision) returns int
language sql immutable parallel safe
as $$ select case when ms <= 1 then 0 when ms > 1 then least(ceil(ln(ms) / ln(1.1)), 219)::int end $$;
comment on function duration_bucket(double precision) is 'The bucket of a duration: each is a tenth longer.';

-- The upper bound of the bucket in which a percentile lies.
create or replace function buckets_percentile(buckets jsonb, share double precision) returns bigint
language sql immutable strict parallel safe
as $$
    select round(power(1.1, b.bucket))::bigint
    from (
        select e.key::int as bucket, sum(e.value::bigint) over (order by e.key::int) as so_far,
            sum(e.value::bigint) over () as total
        from jsonb_each_text(buckets) e
    ) b
    where b.so_far >= b.total * share
    order by b.bucket
    limit 1
$$;
comment on function buckets_percentile(jsonb, double precision) is
    'A percentile of durations counted by bucket, in milliseconds, at most a tenth too high; null: there are none.';

-- Count some due minutes anew, oldest first; how many. Locks rows of rollup_due, which nobody waits for.
create or replace function rollup_some(p_most int) returns int
language plpgsql volatile
as $$
declare
    v_due record;
    v_hours timestamptz[] := '{}';
    v_done int := 0;
begin
    -- One at a time; a second maintenance, as while the duty changes hands, has nothing to do.
    if not pg_try_advisory_xact_lock(hashtext('sluice.rollup')) then
        return 0;
    end if;
    for v_due in
        with oldest as (
            select distinct d.batch_day, d.minute_at
            from rollup_due d
            order by d.minute_at, d.batch_day
            limit p_most
        ),
        taken as (
            delete from rollup_due d
            using oldest o
            where d.batch_day = o.batch_day and d.minute_at = o.minute_at
        )
        select o.batch_day, o.minute_at from oldest o
    loop
        perform rollup_minute(v_due.batch_day, v_due.minute_at);
        v_hours := v_hours || date_trunc('hour', v_due.minute_at, 'UTC');
        v_done := v_done + 1;
    end loop;
    perform rollup_hour(h.at)
    from (select distinct unnest(v_hours) as at) h
    order by h.at;
    return v_done;
end
$$;
comment on function rollup_some(int) is 'Count minutes anew whose attempts have changed, and their hours; how many.';

-- A minute of one partition. Its attempts are looked up by statements that begin after the notes of their writing
-- were taken away (READ COMMITTED), so that nothing written before is missed.
create or replace function rollup_minute(p_batch_day date, p_minute_at timestamptz) returns void
language plpgsql volatile
as $$
begin
    delete from rollup_minutes r where r.batch_day = p_batch_day and r.minute_at = p_minute_at;
    delete from rollup_latency_minutes r where r.batch_day = p_batch_day and r.minute_at = p_minute_at;
    insert into rollup_minutes (
        workspace_id, minute_at, batch_day, resource_id, outcome, error_code, currency, calls, retries,
        input_tokens, cached_tokens, output_tokens, cost_nano
    )
    select a.workspace_id, p_minute_at, p_batch_day, a.resource_id, a.outcome, coalesce(a.error_code, ''),
        coalesce(a.currency, ''), count(*), count(*) filter (where a.attempt > 1),
        coalesce(sum(a.charged_input_tokens) filter (where a.outcome = 'answered'), 0),
        coalesce(sum(a.cached_tokens) filter (where a.outcome = 'answered'), 0),
        coalesce(sum(a.charged_output_tokens) filter (where a.outcome = 'answered'), 0),
        coalesce(sum(a.cost_nano), 0)
    from attempts a
    where a.batch_day = p_batch_day
        and a.ended_at >= p_minute_at
        and a.ended_at < p_minute_at + interval '1 minute'
    group by a.workspace_id, a.resource_id, a.outcome, coalesce(a.error_code, ''), coalesce(a.currency, '');
    with counted as (
        select a.workspace_id, a.resource_id, duration_bucket(a.latency_ms) as latency,
            case when a.attempt = 1
                then duration_bucket(extract(epoch from a.claimed_at - b.created_at)::double precision * 1000)
            end as wait,
            count(*) as calls
        from attempts a
        left join batches b on b.workspace_id = a.workspace_id and b.batch_id = a.batch_id
        where a.batch_day = p_batch_day
            and a.ended_at >= p_minute_at
            and a.ended_at < p_minute_at + interval '1 minute'
            and a.outcome = 'answered'
        group by 1, 2, 3, 4
    ),
    buckets as (
        select workspace_id, resource_id, 'latency' as kind, latency as bucket, sum(calls) as calls
        from counted
        where latency is not null
        group by 1, 2, 4
        union all
        select workspace_id, resource_id, 'wait', wait, sum(calls)
        from counted
        where wait is not null
        group by 1, 2, 4
    )
    insert into rollup_latency_minutes (
        workspace_id, minute_at, batch_day, resource_id, latency_buckets, wait_buckets
    )
    select workspace_id, p_minute_at, p_batch_day, resource_id,
        coalesce(jsonb_object_agg(bucket, calls) filter (where kind = 'latency'), '{}'),
        coalesce(jsonb_object_agg(bucket, calls) filter (where kind = 'wait'), '{}')
    from buckets
    group by workspace_id, resource_id;
end
$$;
comment on function rollup_minute(date, timestamptz) is 'Count one minute of one partition anew.';

create or replace function rollup_hour(p_hour_at timestamptz) returns void
language plpgsql volatile
as $$
begin
    delete from rollup_hours r where r.hour_at = p_hour_at;
    delete from rollup_latency_hours r where r.hour_at = p_hour_at;
    insert into rollup_hours (
        workspace_id, hour_at, resource_id, outcome, error_code, currency, calls, retries, input_tokens,
        cached_tokens, output_tokens, cost_nano
    )
    select m.workspace_id, p_hour_at, m.resource_id, m.outcome, m.error_code, m.currency, sum(m.calls),
        sum(m.retries), sum(m.input_tokens), sum(m.cached_tokens), sum(m.output_tokens), sum(m.cost_nano)
    from rollup_minutes m
    where m.workspace_id in (select w.workspace_id from workspaces w)
        and m.minute_at >= p_hour_at
        and m.minute_at < p_hour_at + interval '1 hour'
    group by m.workspace_id, m.resource_id, m.outcome, m.error_code, m.currency;
    with counted as (
        select m.workspace_id, m.resource_id, b.kind, e.key as bucket, sum(e.value::bigint) as calls
        from rollup_latency_minutes m
        cross join lateral (
            values ('latency', m.latency_buckets), ('wait', m.wait_buckets)
        ) b (kind, buckets)
        left join lateral jsonb_each_text(b.buckets) e on true
        where m.workspace_id in (select w.workspace_id from workspaces w)
            and m.minute_at >= p_hour_at
            and m.minute_at < p_hour_at + interval '1 hour'
        group by m.workspace_id, m.resource_id, b.kind, e.key
    )
    insert into rollup_latency_hours (
        workspace_id, hour_at, resource_id, latency_buckets, wait_buckets
    )
    select c.workspace_id, p_hour_at, c.resource_id,
        coalesce(jsonb_object_agg(c.bucket, c.calls)
            filter (where c.kind = 'latency' and c.bucket is not null), '{}'),
        coalesce(jsonb_object_agg(c.bucket, c.calls)
            filter (where c.kind = 'wait' and c.bucket is not null), '{}')
    from counted c
    group by c.workspace_id, c.resource_id;
end
$$;
comment on function rollup_hour(timestamptz) is 'Add up the minutes of one hour anew.';
