-- settle: record what came back, many calls at a time. What follows from it is in transitions.sql.
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
