-- settle: record what came back, many calls at a time. And the tail that it shares with reclaim and cancel.
--
-- What it does, in one transaction: the item's new state, its result, the attempt's row, the ledger (true
-- usage in place of the reservation, in the slot where it was reserved), the flow's counters, the events, and
-- the end of the batch. Group commit is what makes it fast: a hundred outcomes in a commit cost little more
-- than one.
--
-- Who may change what (design §9). A success closes an item that is not terminal, whatever its attempt: a
-- late answer was paid for. Every other transition needs the current attempt of a running item. What does not
-- pass is recorded as an attempt only. An attempt is settled exactly once through its row: the insert wins, or
-- turns a row that says lost into what really came back; so a flush may be repeated after a lost
-- acknowledgement and changes nothing the second time. When a late answer ends an item that is being tried
-- again, that newer call is noted as lost until it reports: it has no running item any more to account for
-- what it reserved.
--
-- What a refused call is charged: its request, which providers count all the same, and no tokens. What a call
-- cost is computed here, by the price of its claim's time (price_at.sql), once.
--
-- Fallbacks. Where the resource's owner names another model for such an outcome (fallback_of), the item is not failed
-- or left waiting but moves to that model's flow of the same batch: pending there at once, with fresh failures. The
-- flows of all models were made with the batch, so that whoever locks a batch's flows locks them all.
--
-- p_observed: what replies stated of the provider's limits (observe_limits); p_rest_s: how long a model rests that
-- refused calls without saying how long, doubled with every refusal in a row up to p_rest_most_s.
--
-- Lock order: items (SKIP LOCKED, in key order; those skipped are returned as not settled and come again with
-- the next flush) → observed limits → ledger slots → flows → batches → resource_states → scope_states → ready.
-- It takes no scope mutex: an admission beside it reads the reservation instead of the usage, which is the older
-- of two true answers.
--
-- wakes: whether it made work or capacity known to workers that had none (the caller rings).
create or replace function settle(
    p_workspace_id uuid, p_worker_id uuid, p_outcomes json, p_bodies text[], p_observed json,
    p_rest_s double precision, p_rest_most_s double precision
)
returns table (ord int, settled boolean, batch_id uuid, resource_id uuid, becomes text, wakes boolean)
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    v_now timestamptz := clock_timestamp();
    v_given given_outcome[];
    v_given_now given_outcome[];
    v_observed record;
    v_changed settled_item[];
    v_becomes work_status[];
    v_resources uuid[];
    v_unsettled int[];
    v_reserved_costs jsonb;
    v_costs bigint[];
    v_currencies text[];
    v_spent jsonb;
    v_differences jsonb;
    v_freed uuid[];
    v_superseded boolean;
    v_released uuid[];
    v_woken uuid[];
begin
    select array_agg(g order by g.ord) into v_given
    from json_populate_recordset(null::given_outcome, p_outcomes) g;

    -- 1. Lock, then look: the items of these outcomes, and which of them may change how.
    with given as materialized (
        select p_workspace_id as workspace_id, g.ord, g.batch_day, g.batch_id, g.seq, g.attempt,
            g.outcome, g.wait_s, g.status_code, g.error_code
        from unnest(v_given) g
    ),
    held as materialized (
        select g.ord, g.outcome, g.wait_s, g.status_code, g.error_code, i.batch_day, i.batch_id, i.seq, i.resource_id, i.status,
            i.attempt, i.failures, i.crashes, i.max_attempts, i.reserved_cost_nano,
            i.status = 'running' and i.attempt = g.attempt as current, g.attempt as given_attempt
        from given g
        join items i on i.workspace_id = g.workspace_id
            and i.batch_day = g.batch_day
            and i.batch_id = g.batch_id
            and i.seq = g.seq
        order by i.batch_day, i.batch_id, i.seq
        for no key update of i skip locked
    ),
    -- Several attempts of one item may come together; one decides, an answer before all others.
    ranked as (
        select h.*, row_number() over (
            partition by batch_day, batch_id, seq
            order by (outcome = 'answered') desc, current desc, ord
        ) as choice
        from held h
    ),
    judged as materialized (
        select h.*,
            case
                when choice > 1 then null
                when outcome = 'answered' and status = 'running' then 'completed'
                -- A cancelled item keeps its status, also while its row still says pending.
                when outcome = 'answered' and status = 'pending' and not exists (
                    select from flows f
                    where f.workspace_id = p_workspace_id
                        and f.batch_id = h.batch_id
                        and f.resource_id = h.resource_id
                        and f.is_cancelled
                ) then 'completed'
                when not current then null
                when outcome in ('rejected', 'impossible') then 'failed'
                when outcome = 'unreachable' and failures + 1 >= max_attempts then 'failed'
                else 'pending'
            end::work_status as becomes
        from ranked h
    ),
    decided as materialized (
        select j.ord, j.outcome, j.wait_s, j.batch_day, j.batch_id, j.seq, j.resource_id, j.status, j.attempt,
            j.failures, j.crashes, j.given_attempt, j.current, j.reserved_cost_nano, n.moves_to,
            case when n.moves_to is null then j.becomes else 'pending' end as becomes
        from judged j
        cross join lateral (
            select case
                when j.becomes in ('failed', 'pending') and j.outcome in ('rejected', 'unreachable', 'throttled')
                then fallback_of(p_workspace_id, j.batch_id, j.resource_id, j.outcome, j.becomes,
                    j.status_code, j.error_code, j.wait_s)
            end as moves_to
        ) n
    ),
    each_one as materialized (
        select p_workspace_id as workspace_id, ord, max(becomes) as becomes, bool_or(is_held) as is_held,
            (array_agg(resource_id) filter (where becomes is not null))[1] as resource_id
        from (
            select ord, null::work_status as becomes, null::uuid as resource_id, false as is_held from given
            union all
            select ord, becomes, resource_id, true from decided
        ) either
        group by ord
    )
    select (
            select array_agg(row(ord, p_workspace_id, batch_day, batch_id, resource_id, seq, attempt, status, becomes,
                case
                    when becomes = 'completed' then 'answered'
                    when becomes = 'failed' and outcome = 'unreachable' then 'exhausted'
                    when becomes = 'failed' then outcome::text
                end::ended_reason,
                case when becomes = 'pending' then v_now + make_interval(
                    secs => case when moves_to is null then coalesce(wait_s, 0) else 0 end) end,
                case when moves_to is null then failures + (outcome = 'unreachable')::int else 0 end, crashes,
                moves_to)::settled_item
                order by batch_day, batch_id, seq)
            from decided
            where becomes is not null
        ),
        -- By position, so that what follows looks a transition up instead of joining.
        (select array_agg(becomes order by ord) from each_one),
        (select array_agg(resource_id order by ord) from each_one),
        -- Locked by somebody else: to be brought again. (What does not exist any more is not.) Looked up, not
        -- joined: a nested loop would go through all of them for every one.
        (
            select array_agg(e.ord)
            from each_one e
            where not e.is_held
                and (
                    select true
                    from items i
                    where i.workspace_id = e.workspace_id
                        and i.batch_day = (v_given[e.ord]).batch_day
                        and i.batch_id = (v_given[e.ord]).batch_id
                        and i.seq = (v_given[e.ord]).seq
                    limit 1
                )
        ),
        exists (
            select from decided
            where becomes = 'completed' and status = 'running' and attempt <> given_attempt
        ),
        (
            select jsonb_object_agg(ord, reserved_cost_nano)
            from decided
            where current and reserved_cost_nano is not null
        )
    into v_changed, v_becomes, v_resources, v_unsettled, v_superseded, v_reserved_costs;
    v_unsettled := coalesce(v_unsettled, '{}');

    -- 2. Attempts, each once; what they give back to the ledger.
    if v_superseded then
        insert into attempts (
            workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, worker_id,
            claimed_at, ended_at, error_code, error_message, reserved_limits, reserved_input_tokens,
            reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens,
            expected_output_tokens, reserved_cost_nano
        )
        select i.workspace_id, i.batch_day, i.batch_id, i.seq, i.attempt, 'lost', i.resource_id,
            i.worker_id, i.claimed_at, v_now, 'superseded',
            'an earlier attempt was answered during this call, which has not reported',
            i.reserved_limits, i.reserved_input_tokens, i.reserved_output_tokens, 1,
            i.reserved_input_tokens, i.reserved_output_tokens, i.expected_output_tokens,
            i.reserved_cost_nano
        from (select p_workspace_id as workspace_id, o.* from unnest(v_given) o offset 0) g
        join items i on i.workspace_id = g.workspace_id
            and i.batch_day = g.batch_day
            and i.batch_id = g.batch_id
            and i.seq = g.seq
        where v_becomes[g.ord] = 'completed'
            and i.status = 'running'
            and i.attempt <> g.attempt
        on conflict do nothing;
    end if;
    if exists (select from prices) then
        select c.costs, c.currencies into v_costs, v_currencies from call_costs(p_workspace_id, v_given) c;
    end if;
    with given as materialized (
        select p_workspace_id as tenant, g.*, v_costs[g.ord] as cost_nano, v_currencies[g.ord] as currency,
            (v_reserved_costs ->> g.ord::text)::bigint as reserved_cost_nano
        from unnest(v_given) g
        where g.ord <> all (v_unsettled)
    ),
    called as (
        insert into attempts as a (
            workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, connection_id,
            worker_id, claimed_at, started_at, ended_at, latency_ms, status_code, error_code,
            error_message, model, provider_request_id, reserved_limits, reserved_input_tokens,
            reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens,
            cached_tokens, reasoning_tokens, expected_output_tokens, cost_nano, currency, reserved_cost_nano
        )
        select p_workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, connection_id,
            p_worker_id, claimed_at, started_at, coalesce(ended_at, v_now), latency_ms, status_code,
            error_code, error_message, model, request_id, limit_ids, reserved_input_tokens,
            reserved_output_tokens, (not refund)::int,
            case when refund or outcome = 'throttled' then 0
                else coalesce(input_tokens, reserved_input_tokens) end,
            case when refund or outcome = 'throttled' then 0
                else coalesce(output_tokens, reserved_output_tokens) end,
            cached_tokens, reasoning_tokens, expected_output_tokens, cost_nano, currency, reserved_cost_nano
        from given
        where outcome not in ('unsent', 'impossible')
        order by batch_day, batch_id, seq, attempt
        on conflict (workspace_id, batch_day, batch_id, seq, attempt) do update
        set outcome = excluded.outcome, connection_id = excluded.connection_id,
            started_at = excluded.started_at, ended_at = excluded.ended_at,
            latency_ms = excluded.latency_ms, status_code = excluded.status_code,
            error_code = excluded.error_code, error_message = excluded.error_message,
            model = excluded.model, provider_request_id = excluded.provider_request_id,
            charged_requests = excluded.charged_requests,
            charged_input_tokens = excluded.charged_input_tokens,
            charged_output_tokens = excluded.charged_output_tokens,
            cached_tokens = excluded.cached_tokens, reasoning_tokens = excluded.reasoning_tokens,
            cost_nano = excluded.cost_nano, currency = excluded.currency, corrected_at = v_now
        where a.outcome = 'lost' and excluded.outcome <> 'lost'
        returning a.workspace_id, a.batch_day, a.batch_id, a.seq, a.attempt, a.corrected_at, a.cost_nano, a.currency,
            coalesce(coalesce(a.cost_nano, a.reserved_cost_nano) - a.reserved_cost_nano, 0) as cost_difference,
            a.resource_id, a.claimed_at, a.reserved_limits,
            a.charged_requests - 1 as requests,
            a.charged_input_tokens - a.reserved_input_tokens as input_tokens,
            a.charged_output_tokens - a.reserved_output_tokens as output_tokens,
            case when a.outcome = 'lost' then 0
                else a.charged_output_tokens - a.expected_output_tokens end as expected_output_tokens,
            (a.outcome = 'throttled')::int as refused
    ),
    -- Released unsent: no call was made, so there is no row, unless reclaim wrote one that says lost.
    recalled as (
        update attempts a
        set outcome = 'unsent', charged_requests = 0, charged_input_tokens = 0,
            charged_output_tokens = 0, error_code = 'unsent',
            error_message = 'it was not sent after all', corrected_at = v_now
        from given g
        where g.outcome = 'unsent'
            and v_becomes[g.ord] is null
            and a.workspace_id = g.tenant
            and a.batch_day = g.batch_day
            and a.batch_id = g.batch_id
            and a.seq = g.seq
            and a.attempt = g.attempt
            and a.outcome = 'lost'
        returning a.batch_day, a.ended_at, a.resource_id, a.claimed_at, a.reserved_limits,
            -coalesce(a.reserved_cost_nano, 0) as cost_difference, -1 as requests,
            -a.reserved_input_tokens as input_tokens, -a.reserved_output_tokens as output_tokens,
            -a.expected_output_tokens as expected_output_tokens, 0 as refused
    ),
    released as (
        select g.resource_id, g.claimed_at, g.limit_ids as reserved_limits,
            -coalesce(g.reserved_cost_nano, 0) as cost_difference, -1 as requests,
            -g.reserved_input_tokens as input_tokens, -g.reserved_output_tokens as output_tokens,
            -g.expected_output_tokens as expected_output_tokens, 0 as refused
        from given g
        where g.outcome = 'unsent' and v_becomes[g.ord] is not null
    ),
    moved as (
        select claimed_at, reserved_limits, requests, input_tokens, output_tokens, expected_output_tokens,
            refused, cost_difference
        from called
        union all
        select claimed_at, reserved_limits, requests, input_tokens, output_tokens, expected_output_tokens,
            refused, cost_difference
        from recalled
        union all
        select claimed_at, reserved_limits, requests, input_tokens, output_tokens, expected_output_tokens,
            refused, cost_difference
        from released
    ),
    -- The minutes to be rolled up again. Of a corrected call also the one in which it was given up: this
    -- statement's snapshot still shows it there.
    due as (
        insert into rollup_due (batch_day, minute_at)
        select c.batch_day, date_trunc('minute', coalesce(c.ended_at, v_now), 'UTC')
        from given c
        where c.outcome not in ('unsent', 'impossible')
        union
        select a.batch_day, date_trunc('minute', a.ended_at, 'UTC')
        from called c
        join attempts a on a.workspace_id = c.workspace_id
            and a.batch_day = c.batch_day
            and a.batch_id = c.batch_id
            and a.seq = c.seq
            and a.attempt = c.attempt
        where c.corrected_at is not null
        union
        select r.batch_day, date_trunc('minute', r.ended_at, 'UTC') from recalled r
    )
    select jsonb_agg(d), array_agg(distinct d.limit_id)
        filter (where d.requests < 0
            or least(d.input_tokens, d.output_tokens, d.expected_output_tokens, d.cost_nano) < 0),
        (
            select jsonb_agg(s)
            from (
                select c.batch_id, c.resource_id, sum(c.cost_nano) as cost_nano,
                    max(c.currency) as currency
                from called c
                where c.cost_nano > 0
                group by c.batch_id, c.resource_id
            ) s
        )
    into v_differences, v_freed, v_spent
    from (
        select l.limit_id, m.claimed_at, sum(m.requests) as requests, sum(m.input_tokens) as input_tokens,
            sum(m.output_tokens) as output_tokens, sum(m.expected_output_tokens) as expected_output_tokens,
            sum(m.refused) as refused, sum(m.cost_difference) as cost_nano
        from moved m
        cross join unnest(m.reserved_limits) as l (limit_id)
        group by l.limit_id, m.claimed_at
    ) d
    where (d.requests, d.input_tokens, d.output_tokens, d.expected_output_tokens, d.refused, d.cost_nano)
        <> (0, 0, 0, 0, 0, 0);

    -- 3. Items and results.
    perform items_change(p_workspace_id, v_changed, v_now);
    insert into item_results (
        workspace_id, batch_day, batch_id, seq, attempt, ended_at, status_code, input_tokens,
        output_tokens, model, error_code, error_message, headers, body
    )
    select p_workspace_id, g.batch_day, g.batch_id, g.seq, g.attempt, v_now, g.status_code,
        g.input_tokens, g.output_tokens, g.model, g.error_code, g.error_message, g.headers,
        p_bodies[g.ord]::json
    from unnest(v_given) g
    where v_becomes[g.ord] in ('completed', 'failed')
    on conflict do nothing;

    -- 4. The ledger, in the slots of the claims; and what the provider counts beyond it, in the present one. What
    -- came late or again says nothing of now.
    select array_agg(g) into v_given_now
    from unnest(v_given) g
    where v_becomes[g.ord] is not null;
    if p_observed is not null then
        select * into v_observed
        from observe_limits(p_workspace_id, p_observed,
            array(select distinct g.resource_id from unnest(v_given_now) g), v_now);
        v_differences := coalesce(v_differences, '[]') || coalesce(v_observed.differences, '[]');
        v_freed := v_freed || v_observed.raised;
    end if;
    perform ledger_adjust(p_workspace_id, v_differences);

    -- 5. Flows, batches, events.
    v_released := flows_change(p_workspace_id, v_changed, v_freed, v_now, (
        select jsonb_agg(jsonb_build_object('batch_id', g.batch_id, 'resource_id', g.resource_id,
            'input_tokens', g.input_tokens, 'output_tokens', g.output_tokens,
            'cached_tokens', g.cached_tokens, 'reasoning_tokens', g.reasoning_tokens, 'drift', g.drift,
            'cost_nano', g.cost_nano, 'currency', g.currency))
        from (
            select batch_id, resource_id, sum(input_tokens) as input_tokens, sum(output_tokens) as output_tokens,
                sum(cached_tokens) as cached_tokens, sum(reasoning_tokens) as reasoning_tokens,
                sum(drift) as drift, sum(cost_nano) as cost_nano, max(currency) as currency
            from (
                -- By the flow that the item is in: a late answer may be that of a model it has left.
                select o.batch_id, v_resources[o.ord] as resource_id,
                    coalesce(sum(o.input_tokens) filter (where v_becomes[o.ord] = 'completed'), 0)
                        as input_tokens,
                    coalesce(sum(o.output_tokens) filter (where v_becomes[o.ord] = 'completed'), 0)
                        as output_tokens,
                    coalesce(sum(o.cached_tokens) filter (where v_becomes[o.ord] = 'completed'), 0)
                        as cached_tokens,
                    coalesce(sum(o.reasoning_tokens) filter (where v_becomes[o.ord] = 'completed'), 0)
                        as reasoning_tokens,
                    sum(case
                        when o.outcome in ('unsent', 'throttled') or o.refund
                            then -greatest(o.reserved_input_tokens + o.reserved_output_tokens, 1)
                        else coalesce(o.input_tokens + o.output_tokens
                            - o.reserved_input_tokens - o.reserved_output_tokens, 0)
                    end) as drift,
                    null::bigint as cost_nano,
                    null::text as currency
                from unnest(v_given) o
                where v_becomes[o.ord] is not null
                group by o.batch_id, v_resources[o.ord]
                -- By the model that was asked, and also of calls that changed no item any more: late answers were
                -- paid for too.
                union all
                select s.batch_id, s.resource_id, 0, 0, 0, 0, 0, s.cost_nano, s.currency
                from jsonb_to_recordset(v_spent) as s (
                    batch_id uuid, resource_id uuid, cost_nano bigint, currency text
                )
            ) either
            group by batch_id, resource_id
        ) g
    ));

    -- 6. What the replies teach.
    perform observe_outputs(p_workspace_id, v_given_now);
    perform observe_calls(p_workspace_id, v_given_now, v_now, p_rest_s, p_rest_most_s);

    -- 7. What is due again, and capacity that was given back.
    v_woken := ready_change(p_workspace_id, v_changed, v_freed, v_released, v_now);

    return query
    select g.ord, g.ord <> all (v_unsettled), g.batch_id, g.resource_id, v_becomes[g.ord]::text,
        v_woken is not null
    from unnest(v_given) g;
end
$$;
comment on function settle(uuid, uuid, json, text[], json, double precision, double precision) is
    'Record the outcomes of calls. See sql/functions/settle.sql.';

-- The model to ask next after an outcome, of those that an owner's resource names as its fallbacks; null: none. Only
-- one that the batch knows since its creation, and never one before the present: a list ends.
--
-- fallback_on: exhausted (no try is left), statusCodes and errorCodes (at once), throttledMs (the provider asked to
-- wait for longer).
create or replace function fallback_of(
    p_workspace_id uuid, p_batch_id uuid, p_resource_id uuid, p_outcome attempt_outcome, p_becomes work_status,
    p_status_code smallint, p_error_code text, p_wait_s double precision
)
returns uuid
language sql stable
as $$
    select n.resource_id
    from resources r
    join resources o on o.workspace_id = r.workspace_id and o.resource_id = coalesce(r.owner_id, r.resource_id)
    cross join lateral unnest(o.fallback_ids) with ordinality as n (resource_id, position)
    where r.workspace_id = p_workspace_id
        and r.resource_id = p_resource_id
        and o.use_fallback
        and n.position > coalesce(array_position(o.fallback_ids, p_resource_id), 0)
        and (
            p_outcome = 'unreachable' and p_becomes = 'failed' and (o.fallback_on ->> 'exhausted')::boolean
            or o.fallback_on -> 'statusCodes' @> to_jsonb(p_status_code)
            or o.fallback_on -> 'errorCodes' @> to_jsonb(p_error_code)
            or p_outcome = 'throttled' and p_wait_s * 1000 > (o.fallback_on ->> 'throttledMs')::double precision
        )
        and exists (
            select from flows f
            where f.workspace_id = o.workspace_id and f.batch_id = p_batch_id and f.resource_id = n.resource_id
        )
    order by n.position
    limit 1
$$;
comment on function fallback_of(
    uuid, uuid, uuid, attempt_outcome, work_status, smallint, text, double precision
) is 'The model to ask next after an outcome, if its resource names one.';

-- Write the new state of items whose rows the caller has locked.
create or replace function items_change(
    p_workspace_id uuid, p_changed settled_item[], p_now timestamptz
)
returns void
language sql volatile
as $$
    update items i
    set status = c.becomes,
        ended_reason = c.reason,
        ended_at = case when c.becomes = 'pending' then null else p_now end,
        resource_id = coalesce(c.moves_to, i.resource_id),
        visible_at = coalesce(c.visible_at, i.visible_at),
        failures = c.failures,
        crashes = c.crashes,
        worker_id = null,
        claimed_at = null,
        reserved_limits = null,
        reserved_input_tokens = null,
        reserved_output_tokens = null,
        expected_output_tokens = null,
        reserved_cost_nano = null
    from unnest(p_changed) c
    where i.workspace_id = c.workspace_id
        and i.batch_day = c.batch_day
        and i.batch_id = c.batch_id
        and i.seq = c.seq
$$;
comment on function items_change(uuid, settled_item[], timestamptz) is
    'Write the new state of locked items.';

-- Add differences to ledger slots, one after the other in key order, because settlings and claims share slots. A slot
-- that is not there was forgotten long ago; but what the provider counts beyond ours may need a new one.
create or replace function ledger_adjust(p_workspace_id uuid, p_differences jsonb) returns void
language plpgsql volatile
as $$
begin
    if p_differences is null then
        return;
    end if;
    insert into ledger as g (
        workspace_id, limit_id, slot_at, requests, input_tokens, output_tokens, expected_output_tokens,
        refused, outside_requests, outside_input_tokens, outside_output_tokens, cost_nano
    )
    select p_workspace_id, d.limit_id, d.slot_at, d.requests, d.input_tokens, d.output_tokens,
        d.expected_output_tokens, d.refused, d.outside_requests, d.outside_input_tokens,
        d.outside_output_tokens, d.cost_nano
    from (
        select l.workspace_id, l.limit_id, slot_of(l.period, l.sliding, d.claimed_at) as slot_at,
            coalesce(sum(d.requests), 0) as requests, coalesce(sum(d.input_tokens), 0) as input_tokens,
            coalesce(sum(d.output_tokens), 0) as output_tokens,
            coalesce(sum(d.expected_output_tokens), 0) as expected_output_tokens,
            coalesce(sum(d.refused), 0) as refused, coalesce(sum(d.cost_nano), 0) as cost_nano,
            coalesce(sum(d.outside_requests), 0) as outside_requests,
            coalesce(sum(d.outside_input_tokens), 0) as outside_input_tokens,
            coalesce(sum(d.outside_output_tokens), 0) as outside_output_tokens,
            bool_or(d.outside_requests is not null) as is_outside
        from jsonb_to_recordset(p_differences) as d (
            limit_id uuid, claimed_at timestamptz, requests bigint, input_tokens bigint,
            output_tokens bigint, expected_output_tokens bigint, refused bigint, outside_requests bigint,
            outside_input_tokens bigint, outside_output_tokens bigint, cost_nano bigint
        )
        join limits l on l.workspace_id = p_workspace_id and l.limit_id = d.limit_id
        group by l.workspace_id, l.limit_id, slot_of(l.period, l.sliding, d.claimed_at)
    ) d
    -- Not exists: beside an or it may be hashed, and then reads every slot of the workspace.
    where d.is_outside or (
        select true
        from ledger h
        where h.workspace_id = d.workspace_id and h.limit_id = d.limit_id and h.slot_at = d.slot_at
        limit 1
    )
    order by d.limit_id, d.slot_at
    on conflict on constraint ledger_pkey do update
    set requests = g.requests + excluded.requests,
        input_tokens = g.input_tokens + excluded.input_tokens,
        output_tokens = g.output_tokens + excluded.output_tokens,
        expected_output_tokens = g.expected_output_tokens + excluded.expected_output_tokens,
        refused = g.refused + excluded.refused,
        cost_nano = g.cost_nano + excluded.cost_nano,
        outside_requests = g.outside_requests + excluded.outside_requests,
        outside_input_tokens = g.outside_input_tokens + excluded.outside_input_tokens,
        outside_output_tokens = g.outside_output_tokens + excluded.outside_output_tokens;
end
$$;
comment on function ledger_adjust(uuid, jsonb) is 'Add differences to ledger slots, locked in order.';

-- Move the counters of flows, write the events, end the batches.
-- p_usage: per flow the tokens of answered items, what its calls cost, and drift, what settling corrected virtual
-- time by.
-- p_freed: limits that have room again; flows that waited for one are looked at again. Returns the resources of
-- all flows that do not wait any more.
--
-- A flow that was cancelled meanwhile turns every return to pending into cancelled; the rows say pending
-- until cancel_chunk has marked them (unmarked counts those).
create or replace function flows_change(
    p_workspace_id uuid, p_changed settled_item[], p_freed uuid[], p_now timestamptz, p_usage jsonb
)
returns uuid[]
language plpgsql volatile
as $$
declare
    v_batch_ids uuid[];
    v_batch record;
    v_released uuid[];
begin
    if exists (
        select from flows f
        where f.workspace_id = p_workspace_id and f.is_open and f.waits_for = any (p_freed)
    ) then
        -- All rows in one order, those changed below included. Found by their indexes: with an or in place of the
        -- union every flow of the workspace was read.
        perform 1
        from (
            select f.workspace_id, f.batch_id, f.resource_id
            from flows f
            where f.workspace_id = p_workspace_id and f.is_open and f.waits_for = any (p_freed)
            union
            select p_workspace_id, c.batch_id, c.resource_id from unnest(p_changed) c
            union
            select p_workspace_id, c.batch_id, c.moves_to from unnest(p_changed) c
            union
            select p_workspace_id, s.batch_id, s.resource_id
            from jsonb_to_recordset(p_usage) as s (batch_id uuid, resource_id uuid)
        ) c
        join flows f on f.workspace_id = c.workspace_id
            and f.batch_id = c.batch_id
            and f.resource_id = c.resource_id
        order by f.batch_id, f.resource_id
        for no key update of f;
        with released as (
            update flows f
            set waits_until = '-infinity', waits_for = null,
                virtual_time = greatest(f.virtual_time,
                    flow_entry(f.workspace_id, f.resource_id, f.priority))
            where f.workspace_id = p_workspace_id and f.is_open and f.waits_for = any (p_freed)
            returning f.resource_id
        )
        select array_agg(resource_id) into v_released from released;
    end if;
    -- Rows are locked in key order by statements of their own and then changed all at once: a settling may touch
    -- hundreds of flows.
    perform 1
    from (
        select p_workspace_id as workspace_id, o.batch_id, o.resource_id from unnest(p_changed) o
        union
        select p_workspace_id, o.batch_id, o.moves_to from unnest(p_changed) o
        union
        select p_workspace_id, s.batch_id, s.resource_id
        from jsonb_to_recordset(p_usage) as s (batch_id uuid, resource_id uuid)
    ) c
    join flows f on f.workspace_id = c.workspace_id
        and f.batch_id = c.batch_id
        and f.resource_id = c.resource_id
    order by f.batch_id, f.resource_id
    for no key update of f;
    with changed as materialized (
        -- Summed up before it is joined: a nested loop would look for every item among all flows.
        select p_workspace_id as workspace_id, c.*, coalesce(u.input_tokens, 0) as input_tokens,
            coalesce(u.output_tokens, 0) as output_tokens, coalesce(u.cached_tokens, 0) as cached_tokens,
            coalesce(u.reasoning_tokens, 0) as reasoning_tokens, coalesce(u.drift, 0) as drift,
            coalesce(u.cost_nano, 0) as cost_nano, u.currency
        from (
            select batch_id, resource_id, min(batch_day) as batch_day,
                count(*) filter (where was = 'running')::int as left_running,
                count(*) filter (where was = 'pending')::int as left_pending,
                count(*) filter (where was = 'pending' and attempt = 0)::int as left_unstarted,
                -- What comes from another model waits here as what returns does.
                count(*) filter (where becomes = 'pending')::int as to_pending,
                count(*) filter (where becomes = 'completed')::int as to_completed,
                count(*) filter (where becomes = 'failed')::int as to_failed,
                count(*) filter (where was is null and becomes is not null)::int as come,
                count(*) filter (where was is not null and becomes is null)::int as gone
            from (
                select n.batch_id, n.resource_id, n.batch_day, n.was, n.attempt,
                    case when n.moves_to is null then n.becomes end as becomes
                from unnest(p_changed) n
                union all
                select n.batch_id, n.moves_to, n.batch_day, null, null, n.becomes
                from unnest(p_changed) n
                where n.moves_to is not null
                union all
                -- What cost something and changed no item is an element without states.
                select s.batch_id, s.resource_id, null, null, null, null
                from jsonb_to_recordset(p_usage) as s (batch_id uuid, resource_id uuid, cost_nano bigint)
                where s.cost_nano is not null
            ) either
            group by batch_id, resource_id
        ) c
        left join jsonb_to_recordset(p_usage) as u (
            batch_id uuid, resource_id uuid, input_tokens bigint, output_tokens bigint,
            cached_tokens bigint, reasoning_tokens bigint, drift double precision, cost_nano bigint, currency text
        ) on u.batch_id = c.batch_id and u.resource_id = c.resource_id
    ),
    waited as materialized (
        select f.resource_id
        from changed c
        join flows f on f.workspace_id = c.workspace_id
            and f.batch_id = c.batch_id
            and f.resource_id = c.resource_id
        where f.waits_for is not null
    ),
    updated as (
        update flows f
        set running = f.running - c.left_running,
            unstarted = f.unstarted - case when f.is_cancelled then 0 else c.left_unstarted end,
            pending = f.pending + case when f.is_cancelled then 0 else c.to_pending - c.left_pending end,
            cancelled = f.cancelled + case when f.is_cancelled then c.to_pending - c.left_pending else 0 end,
            unmarked = f.unmarked + case when f.is_cancelled then c.to_pending - c.left_pending else 0 end,
            completed = f.completed + c.to_completed,
            failed = f.failed + c.to_failed,
            total = f.total + c.come - c.gone,
            retries = f.retries + c.to_pending - c.come + c.gone,
            input_tokens = f.input_tokens + c.input_tokens,
            output_tokens = f.output_tokens + c.output_tokens,
            cached_tokens = f.cached_tokens + c.cached_tokens,
            reasoning_tokens = f.reasoning_tokens + c.reasoning_tokens,
            cost_nano = f.cost_nano + c.cost_nano,
            currency = coalesce(c.currency, f.currency),
            virtual_time = greatest(
                -- What waited for nothing but its own calls re-enters at the virtual time of the others.
                -- So does what waited for a limit of its own.
                case when f.pending = 0 and c.to_pending > 0 and not f.is_cancelled or f.waits_for is not null
                    then greatest(f.virtual_time, flow_entry(f.workspace_id, f.resource_id, f.priority))
                    else f.virtual_time end
                + c.drift / (f.weight * urgency(f.created_at, f.expires_at, p_now))
                    * first_share((f.total - f.unstarted)::bigint), 0),
            -- A limit of its own may have room now.
            waits_until = '-infinity',
            waits_for = null,
            is_open = f.running - c.left_running + f.pending + f.unmarked + c.to_pending - c.left_pending > 0
        from changed c
        where f.workspace_id = c.workspace_id and f.batch_id = c.batch_id and f.resource_id = c.resource_id
    )
    select v_released || array_agg(resource_id) into v_released from waited;

    select array_agg(distinct c.batch_id) into v_batch_ids from unnest(p_changed) c;
    perform 1
    from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = any (v_batch_ids)
    order by b.batch_id
    for no key update;
    -- Before the end of any is told: what is told depends on it.
    update batches b
    set expired_at = p_now
    where b.workspace_id = p_workspace_id
        and b.batch_id in (select c.batch_id from unnest(p_changed) c where c.reason = 'expired')
        and b.expired_at is null;
    perform events_append(p_workspace_id, array(
        select row(h.batch_day, h.batch_id, h.kind, h.seqs)::happening
        from (
            select c.batch_day, c.batch_id, c.kind, array_agg(c.seq order by c.seq) as seqs
            from (
                select o.*, case o.becomes when 'completed' then 'item-completed' when 'failed' then 'item-failed'
                    when 'pending' then 'item-retrying' end::event_kind as kind
                from unnest(p_changed) o
            ) c
            where c.kind is not null
            group by c.batch_day, c.batch_id, c.kind
        ) h
        where h.kind <> 'item-retrying' or not exists (
            select from batches b
            where b.workspace_id = p_workspace_id and b.batch_id = h.batch_id and b.status = 'cancelled'
        )
        order by h.batch_id, h.kind
    ), p_now);
    -- Under the same locks the last of several settlings sees what the others committed.
    for v_batch in
        select b.batch_id, b.batch_day
        from batches b
        where b.workspace_id = p_workspace_id
            and b.batch_id = any (v_batch_ids)
            and not exists (
                select from flows f
                where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id and f.is_open
            )
        order by b.batch_id
    loop
        perform batch_finish(p_workspace_id, v_batch.batch_day, v_batch.batch_id, p_now);
    end loop;
    return v_released;
end
$$;
comment on function flows_change(uuid, settled_item[], uuid[], timestamptz, jsonb) is
    'Counters, events and ends that follow from items'' transitions.';

-- Make known when resources have work again, and at once where what they wait for is there again: a limit with
-- room (p_freed), a flow that waits no more
-- (p_released), or a call less in flight. Every row is locked before it is looked at: a claim beside us may be about
-- to say that nothing waits, having seen neither our items nor our refund. That may be a claim of any resource which
-- shares a connection with ours. The last locks of a transaction, all in one order. Returns whom it woke.
create or replace function ready_change(
    p_workspace_id uuid, p_changed settled_item[], p_freed uuid[], p_released uuid[], p_now timestamptz
)
returns uuid[]
language plpgsql volatile
as $$
declare
    v_due record;
    v_woken uuid[];
begin
    for v_due in
        select d.resource_id, min(d.due_at) as due_at
        from (
            select o.resource_id,
                case when o.resource_id = c.resource_id then c.due_at end as due_at
            from (
                select n.resource_id, min(n.due_at) as due_at
                from (
                    select c.resource_id, case when c.becomes = 'pending' and c.moves_to is null
                        then c.visible_at end as due_at
                    from unnest(p_changed) c
                    union all
                    select c.moves_to, c.visible_at from unnest(p_changed) c where c.moves_to is not null
                ) n
                group by n.resource_id
            ) c
            join resources r on r.workspace_id = p_workspace_id and r.resource_id = c.resource_id
            join resources o on o.workspace_id = r.workspace_id and o.connection_id = r.connection_id
            union all
            select r, p_now from unnest(p_released) r
        ) d
        group by d.resource_id
        order by d.resource_id
    loop
        perform 1 from ready r
        where r.workspace_id = p_workspace_id and r.resource_id = v_due.resource_id
        for no key update;
        update ready r
        set next_at = least(v_due.due_at, case when wakes then p_now end), reason = null, waits_for = null
        from (
            select o.resource_id,
                o.waits_for = any (p_freed)
                or o.reason = 'concurrency'
                -- The call sent ahead after a refusal was answered.
                or o.reason = 'cooldown' and not exists (
                    select from resources c
                    join scope_states t on t.workspace_id = c.workspace_id
                        and t.scope_id in (c.model_scope_id, c.connection_id)
                    where c.workspace_id = o.workspace_id
                        and c.resource_id = o.resource_id
                        and (t.blocked_until > p_now or t.refusals > 0)
                ) as wakes
            from ready o
            where o.workspace_id = p_workspace_id and o.resource_id = v_due.resource_id
        ) w
        where r.workspace_id = p_workspace_id
            and r.resource_id = w.resource_id
            and r.next_at > least(v_due.due_at, case when wakes then p_now end);
        if found then
            v_woken := v_woken || v_due.resource_id;
        end if;
    end loop;
    return v_woken;
end
$$;
comment on function ready_change(uuid, settled_item[], uuid[], uuid[], timestamptz) is
    'Make known when resources have work or capacity again.';

-- The virtual time at which a flow of a resource (re-)enters: that of the one served next of its priority, or else
-- of the one served last; of any priority if there is none of its own. A flow that waits for later retries or for a
-- limit of its own is neither.
create or replace function flow_entry(p_workspace_id uuid, p_resource_id uuid, p_priority smallint)
returns double precision
language sql stable
as $$
    select coalesce(
        min(f.virtual_time) filter (where is_next and f.priority = p_priority),
        max(f.virtual_time) filter (where f.priority = p_priority),
        min(f.virtual_time) filter (where is_next),
        max(f.virtual_time),
        0
    )
    from flows f
    cross join lateral (
        select f.waits_for is null and (
            f.unstarted > 0
            -- Not exists: see the same in claim.
            or f.pending > 0 and coalesce((
                select true
                from items i
                where i.workspace_id = f.workspace_id
                    and i.batch_day = f.batch_day
                    and i.batch_id = f.batch_id
                    and i.resource_id = f.resource_id
                    and i.status = 'pending'
                    and i.attempt > 0
                    and i.visible_at <= clock_timestamp()
                limit 1
            ), false)
        ) as is_next
    ) n
    where f.workspace_id = p_workspace_id
        and f.resource_id = p_resource_id
        and f.is_open
        and not f.is_paused
        and not f.is_cancelled
$$;
comment on function flow_entry(uuid, uuid, smallint) is 'Virtual time at which a flow of a resource enters.';

-- End a batch when all of its flows have ended. The caller holds the flows it changed; the batch's row
-- lock makes the last of several settlings see what the others committed.
create or replace function batch_finish(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_now timestamptz
)
returns work_status
language plpgsql volatile
as $$
declare
    v_status work_status;
    v_open boolean;
    v_failed bigint;
    v_cancelled bigint;
begin
    select b.status into v_status
    from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id and b.completed_at is null
    for no key update;
    if not found then
        return null;
    end if;
    select bool_or(f.is_open), sum(f.failed), sum(f.cancelled) into v_open, v_failed, v_cancelled
    from flows f
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id;
    if v_open then
        return null;
    end if;
    if v_status <> 'cancelled' then
        -- Some of a cancelled batch's items were tried again, the others stay as they are.
        v_status := case
            when v_failed > 0 then 'failed'
            when v_cancelled > 0 then 'cancelled'
            else 'completed'
        end;
    end if;
    update batches b
    set status = v_status, completed_at = p_now,
        cancelled_at = case when v_status = 'cancelled' then coalesce(b.cancelled_at, p_now) end
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id;
    perform event_append(
        p_workspace_id, p_batch_day, p_batch_id, ('batch-' || v_status)::event_kind, null, p_now);
    return v_status;
end
$$;
comment on function batch_finish(uuid, date, uuid, timestamptz) is
    'End a batch whose flows have all ended.';
