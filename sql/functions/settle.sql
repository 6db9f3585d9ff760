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
-- p_outcomes: [{batch_day, batch_id, resource_id, connection_id, claimed_at, limit_ids, model, ords: […], seqs: […],
-- attempts: […], calls: [{outcome, …}]}], calls of one claim and model together, because what each would repeat costs more
-- to read than all that differs. ord counts from 1 in the order of the items' keys: to sort by it is to lock in that
-- order. p_bodies: by ord. p_observed: what replies stated of the provider's limits (observe_limits); p_rest_s: how long a
-- model rests that refused calls without saying how long, doubled with every refusal in a row up to p_rest_most_s.
--
-- Lock order: items (SKIP LOCKED, in key order; those skipped are returned as not settled and come again with
-- the next flush) → observed limits → ledger slots → flows → batches → resource_states → scope_states → ready.
-- It takes no scope mutex: an admission beside it reads the reservation instead of the usage, which is the older
-- of two true answers.
--
-- unsettled: ords whose items somebody else had locked. becomes: by ord, the new state of the item; null: unchanged.
-- wakes: whether it made work or capacity known to workers that had none (the caller rings).
create or replace function settle(
    p_workspace_id uuid, p_worker_id uuid, p_outcomes json, p_bodies text[], p_observed json,
    p_rest_s double precision, p_rest_most_s double precision,
    out unsettled int[], out becomes text[], out wakes boolean
)
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
    v_held int[];
    v_is_late boolean;
    v_is_twice boolean;
    v_unsettled int[] := '{}';
    v_idle int[] := '{}';
    v_observed record;
    v_changed settled_item[];
    v_becomes text[];
    v_replies jsonb;
    v_usage jsonb;
    v_differences jsonb;
    v_freed uuid[];
    v_released uuid[];
    v_woken uuid[];
begin
    -- 1. Lock, then look: the items of these outcomes. What follows are statements of their own, which see all that
    -- the locks' previous holders committed.
    with given as materialized (
        select p_workspace_id as workspace_id, g.batch_day, g.batch_id, c.*
        from json_to_recordset(p_outcomes) as g (
            batch_day date, batch_id uuid, ords int[], seqs int[], attempts int[]
        )
        cross join lateral unnest(g.ords, g.seqs, g.attempts) as c (ord, seq, attempt)
    ),
    held as materialized (
        select g.ord, i.batch_id, i.seq, i.status = 'running' and i.attempt <> g.attempt as is_late
        from given g
        join items i on i.workspace_id = g.workspace_id
            and i.batch_day = g.batch_day
            and i.batch_id = g.batch_id
            and i.seq = g.seq
        order by g.ord
        for no key update of i skip locked
    )
    select array_agg(h.ord), bool_or(h.is_late),
        count(*) > (select count(*) from (select from held group by batch_id, seq) items)
    into v_held, v_is_late, v_is_twice
    from held h;
    if coalesce(cardinality(v_held), 0) < cardinality(p_bodies) then
        -- Locked by somebody else: to be brought again. (What does not exist any more is not.)
        select coalesce(array_agg(c.ord), '{}') into v_unsettled
        from json_to_recordset(p_outcomes) as g (batch_day date, batch_id uuid, ords int[], seqs int[])
        cross join lateral unnest(g.ords, g.seqs) as c (ord, seq)
        where c.ord <> all (coalesce(v_held, '{}')) and (
            select true
            from items i
            where i.workspace_id = p_workspace_id
                and i.batch_day = g.batch_day
                and i.batch_id = g.batch_id
                and i.seq = c.seq
            limit 1
        );
    end if;
    if v_is_twice then
        -- Several attempts of one item came together; one decides, an answer before all others.
        select coalesce(array_agg(r.ord) filter (where r.choice > 1), '{}') into v_idle
        from (
            select c.ord, row_number() over (
                partition by g.batch_id, c.seq
                order by c.outcome = 'answered' desc, i.status = 'running' and i.attempt = c.attempt desc, c.ord
            ) as choice
            from json_to_recordset(p_outcomes) as g (
                batch_day date, batch_id uuid, ords int[], seqs int[], attempts int[], calls json
            )
            cross join lateral rows from (
                unnest(g.ords, g.seqs, g.attempts), json_to_recordset(g.calls) as (outcome attempt_outcome)
            ) as c (ord, seq, attempt, outcome)
            join items i on i.workspace_id = p_workspace_id
                and i.batch_day = g.batch_day
                and i.batch_id = g.batch_id
                and i.seq = c.seq
            where c.ord = any (v_held)
        ) r;
    end if;
    if v_is_late then
        perform supersede(p_workspace_id, p_outcomes, v_held, v_now);
    end if;

    -- 2. What becomes of each item; the attempts, each once, and what they give back to the ledger; the results.
    with grants as materialized (
        -- One look for a price per claim and model, not per call.
        select g.*, p.*
        from json_to_recordset(p_outcomes) as g (
            batch_day date, batch_id uuid, resource_id uuid, connection_id uuid, claimed_at timestamptz,
            limit_ids uuid[], model text, ords int[], seqs int[], attempts int[], calls json
        )
        left join resources r on r.workspace_id = p_workspace_id and r.resource_id = g.resource_id
        left join lateral price_at(p_workspace_id, coalesce(g.model, r.model), r.model, g.claimed_at) p on true
    ),
    given as (
        select p_workspace_id as workspace_id, g.batch_day, g.batch_id, g.resource_id, g.connection_id, g.claimed_at,
            g.limit_ids, g.model, g.input_nano, g.cached_nano, g.output_nano, g.currency, c.*
        from grants g
        cross join lateral rows from (
            unnest(g.ords, g.seqs, g.attempts),
            json_to_recordset(g.calls) as (
                outcome attempt_outcome, refund boolean, wait_s double precision, started_at timestamptz,
                ended_at timestamptz, latency_ms int, status_code smallint, error_code text, error_message text,
                request_id text, reserved_input_tokens int, reserved_output_tokens int,
                expected_output_tokens int, input_tokens int, output_tokens int, cached_tokens int,
                reasoning_tokens int, headers jsonb
            )
        ) as c (
            ord, seq, attempt, outcome, refund, wait_s, started_at, ended_at, latency_ms, status_code, error_code,
            error_message, request_id, reserved_input_tokens, reserved_output_tokens, expected_output_tokens,
            input_tokens, output_tokens, cached_tokens, reasoning_tokens, headers
        )
        where c.ord <> all (v_unsettled)
        offset 0
    ),
    judged as (
        select g.*, i.resource_id as flow_resource_id, i.status as was, i.attempt as last_attempt,
            i.failures, i.crashes, n.is_current, case when n.is_current then i.reserved_cost_nano end as reserved_cost_nano,
            case
                when g.ord = any (v_idle) then null
                when g.outcome = 'answered' and i.status = 'running' then 'completed'
                -- A cancelled item keeps its status, also while its row still says pending.
                when g.outcome = 'answered' and i.status = 'pending' and not (
                    select f.is_cancelled
                    from flows f
                    where f.workspace_id = g.workspace_id
                        and f.batch_id = g.batch_id
                        and f.resource_id = i.resource_id
                ) then 'completed'
                when n.is_current is not true then null
                when g.outcome in ('rejected', 'impossible') then 'failed'
                when g.outcome = 'unreachable' and i.failures + 1 >= i.max_attempts then 'failed'
                else 'pending'
            end::work_status as verdict
        from given g
        left join items i on i.workspace_id = g.workspace_id
            and i.batch_day = g.batch_day
            and i.batch_id = g.batch_id
            and i.seq = g.seq
        cross join lateral (select i.status = 'running' and i.attempt = g.attempt as is_current offset 0) n
        offset 0
    ),
    decided as materialized (
        -- What is read often comes first: to read a column is to go over all that stand before it.
        select case when n.moves_to is null then j.verdict else 'pending' end as becomes, n.moves_to,
            call_cost(j.outcome, j.refund, j.input_tokens, j.cached_tokens, j.output_tokens, j.reserved_input_tokens,
                j.reserved_output_tokens, j.input_nano, j.cached_nano, j.output_nano) as cost_nano,
            j.*
        from judged j
        cross join lateral (
            select case
                when j.verdict in ('failed', 'pending') and j.outcome in ('rejected', 'unreachable', 'throttled')
                then fallback_of(j.workspace_id, j.batch_id, j.flow_resource_id, j.outcome, j.verdict,
                    j.status_code, j.error_code, j.wait_s)
            end as moves_to
            offset 0
        ) n
    ),
    called as (
        insert into attempts as a (
            workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, connection_id,
            worker_id, claimed_at, started_at, ended_at, latency_ms, status_code, error_code,
            error_message, model, provider_request_id, reserved_limits, reserved_input_tokens,
            reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens,
            cached_tokens, reasoning_tokens, expected_output_tokens, cost_nano, currency, reserved_cost_nano
        )
        select workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, connection_id,
            p_worker_id, claimed_at, started_at, coalesce(ended_at, v_now), latency_ms, status_code,
            error_code, error_message, model, request_id, limit_ids, reserved_input_tokens,
            reserved_output_tokens, (not refund)::int,
            case when refund or outcome = 'throttled' then 0
                else coalesce(input_tokens, reserved_input_tokens) end,
            case when refund or outcome = 'throttled' then 0
                else coalesce(output_tokens, reserved_output_tokens) end,
            cached_tokens, reasoning_tokens, expected_output_tokens, cost_nano,
            case when outcome <> 'lost' then currency end, reserved_cost_nano
        from decided
        where outcome not in ('unsent', 'impossible')
        order by ord
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
        from decided d
        where d.outcome = 'unsent'
            and d.becomes is null
            and a.workspace_id = d.workspace_id
            and a.batch_day = d.batch_day
            and a.batch_id = d.batch_id
            and a.seq = d.seq
            and a.attempt = d.attempt
            and a.outcome = 'lost'
        returning a.batch_day, a.ended_at, a.claimed_at, a.reserved_limits,
            -coalesce(a.reserved_cost_nano, 0) as cost_difference, -1 as requests,
            -a.reserved_input_tokens as input_tokens, -a.reserved_output_tokens as output_tokens,
            -a.expected_output_tokens as expected_output_tokens, 0 as refused
    ),
    answered as (
        insert into item_results (
            workspace_id, batch_day, batch_id, seq, attempt, ended_at, status_code, input_tokens,
            output_tokens, model, error_code, error_message, headers, body
        )
        select workspace_id, batch_day, batch_id, seq, attempt, v_now, status_code,
            input_tokens, output_tokens, model, error_code, error_message, headers, p_bodies[ord]::json
        from decided
        where becomes in ('completed', 'failed')
        on conflict do nothing
    ),
    -- The minutes to be rolled up again. Of a corrected call also the one in which it was given up: this
    -- statement's snapshot still shows it there.
    due as (
        insert into rollup_due (batch_day, minute_at)
        select d.batch_day, date_bin('1 minute', coalesce(d.ended_at, v_now), 'epoch')
        from decided d
        where d.outcome not in ('unsent', 'impossible')
        union
        select a.batch_day, date_bin('1 minute', a.ended_at, 'epoch')
        from called c
        join attempts a on a.workspace_id = c.workspace_id
            and a.batch_day = c.batch_day
            and a.batch_id = c.batch_id
            and a.seq = c.seq
            and a.attempt = c.attempt
        where c.corrected_at is not null
        union
        select r.batch_day, date_bin('1 minute', r.ended_at, 'epoch') from recalled r
    ),
    moved as (
        select l.limit_id, m.claimed_at, sum(m.requests) as requests, sum(m.input_tokens) as input_tokens,
            sum(m.output_tokens) as output_tokens, sum(m.expected_output_tokens) as expected_output_tokens,
            sum(m.refused) as refused, sum(m.cost_difference) as cost_nano
        from (
            select reserved_limits, claimed_at, sum(requests) as requests, sum(input_tokens) as input_tokens,
                sum(output_tokens) as output_tokens, sum(expected_output_tokens) as expected_output_tokens,
                sum(refused) as refused, sum(cost_difference) as cost_difference
            from (
                select claimed_at, reserved_limits, requests, input_tokens, output_tokens, expected_output_tokens,
                    refused, cost_difference
                from called
                union all
                select claimed_at, reserved_limits, requests, input_tokens, output_tokens, expected_output_tokens,
                    refused, cost_difference
                from recalled
                union all
                select claimed_at, limit_ids, -1, -reserved_input_tokens, -reserved_output_tokens,
                    -expected_output_tokens, 0, -coalesce(reserved_cost_nano, 0)
                from decided
                where outcome = 'unsent' and becomes is not null
            ) calls
            group by reserved_limits, claimed_at
        ) m
        cross join unnest(m.reserved_limits) as l (limit_id)
        group by l.limit_id, m.claimed_at
    ),
    used as (
        -- By the flow that the item is in: a late answer may be that of a model it has left.
        select batch_id, flow_resource_id as resource_id,
            coalesce(sum(input_tokens) filter (where becomes = 'completed'), 0) as input_tokens,
            coalesce(sum(output_tokens) filter (where becomes = 'completed'), 0) as output_tokens,
            coalesce(sum(cached_tokens) filter (where becomes = 'completed'), 0) as cached_tokens,
            coalesce(sum(reasoning_tokens) filter (where becomes = 'completed'), 0) as reasoning_tokens,
            sum(case
                when outcome in ('unsent', 'throttled') or refund
                    then -greatest(reserved_input_tokens + reserved_output_tokens, 1)
                else coalesce(input_tokens + output_tokens - reserved_input_tokens - reserved_output_tokens, 0)
            end) as drift,
            null::bigint as cost_nano, null::text as currency
        from decided
        where becomes is not null
        group by batch_id, flow_resource_id
        -- By the model that was asked, and also of calls that changed no item any more: late answers were
        -- paid for too.
        union all
        select batch_id, resource_id, 0, 0, 0, 0, 0, sum(cost_nano), max(currency)
        from called
        where cost_nano > 0
        group by batch_id, resource_id
    )
    select
        (
            select array_agg(row(ord, workspace_id, batch_day, batch_id, flow_resource_id, seq, last_attempt, was,
                becomes,
                case
                    when becomes = 'completed' then 'answered'
                    when becomes = 'failed' and outcome = 'unreachable' then 'exhausted'
                    when becomes = 'failed' then outcome::text
                end::ended_reason,
                case when becomes = 'pending' then v_now + make_interval(
                    secs => case when moves_to is null then coalesce(wait_s, 0) else 0 end) end,
                case when moves_to is null then failures + (outcome = 'unreachable')::int else 0 end, crashes,
                moves_to)::settled_item
                order by ord)
            from decided
            where becomes is not null
        ),
        (
            select array_agg(e.becomes order by e.ord)
            from (
                select ord, becomes::text as becomes from decided
                union all
                select o, null from unnest(v_unsettled) o
            ) e
        ),
        -- What is late or comes again says nothing of now, and is left out of what replies teach.
        (
            select jsonb_agg(r)
            from (
                select resource_id, connection_id,
                    count(*) filter (where outcome not in ('unsent', 'impossible', 'lost')) as calls,
                    count(*) filter (where outcome = 'answered') as answered,
                    max(claimed_at) filter (where outcome = 'answered') as answered_at,
                    max(claimed_at) filter (where outcome = 'throttled' and error_code = 'rate_limited')
                        as refused_at,
                    max(claimed_at) filter (where outcome = 'throttled'
                        and error_code in ('overloaded', 'concurrency_limited')) as overloaded_at,
                    bool_or(outcome = 'throttled' and error_code = 'overloaded') as is_overloaded,
                    bool_or(outcome = 'throttled') as is_throttled,
                    max(wait_s) filter (where outcome = 'throttled') as wait_s,
                    max(error_code) filter (where outcome = 'throttled') as code,
                    max(coalesce(wait_s, 60)) filter (where outcome = 'throttled'
                        and error_code = 'insufficient_quota') as out_of_money_s,
                    (array_agg(output_tokens order by ord desc) filter (where outcome = 'answered'
                        and output_tokens is not null))[:8] as outputs
                from decided
                where becomes is not null
                group by resource_id, connection_id
            ) r
        ),
        (
            select jsonb_agg(u)
            from (
                select batch_id, resource_id, sum(input_tokens) as input_tokens, sum(output_tokens) as output_tokens,
                    sum(cached_tokens) as cached_tokens, sum(reasoning_tokens) as reasoning_tokens,
                    sum(drift) as drift, sum(cost_nano) as cost_nano, max(currency) as currency
                from used
                group by batch_id, resource_id
            ) u
        ),
        jsonb_agg(m) filter (where (m.requests, m.input_tokens, m.output_tokens, m.expected_output_tokens, m.refused,
            m.cost_nano) <> (0, 0, 0, 0, 0, 0)),
        array_agg(distinct m.limit_id) filter (where m.requests < 0
            or least(m.input_tokens, m.output_tokens, m.expected_output_tokens, m.cost_nano) < 0)
    into v_changed, v_becomes, v_replies, v_usage, v_differences, v_freed
    from moved m;

    -- 3. The items.
    perform items_change(p_workspace_id, v_changed, v_now);

    -- 4. The ledger, in the slots of the claims; and what the provider counts beyond it, in the present one.
    if p_observed is not null then
        select * into v_observed
        from observe_limits(p_workspace_id, p_observed,
            array(select (r ->> 'resource_id')::uuid from jsonb_array_elements(v_replies) r), v_now);
        v_differences := coalesce(v_differences, '[]') || coalesce(v_observed.differences, '[]');
        v_freed := v_freed || v_observed.raised;
    end if;
    perform ledger_adjust(p_workspace_id, v_differences);

    -- 5. Flows, batches, events.
    v_released := flows_change(p_workspace_id, v_changed, v_freed, v_now, v_usage);

    -- 6. What the replies teach.
    perform observe_outputs(p_workspace_id, v_replies);
    perform observe_calls(p_workspace_id, v_replies, v_now, p_rest_s, p_rest_most_s);

    -- 7. What is due again, and capacity that was given back.
    v_woken := ready_change(p_workspace_id, v_changed, v_freed, v_released, v_now);

    unsettled := v_unsettled;
    becomes := v_becomes;
    wakes := v_woken is not null;
end
$$;
comment on function settle(uuid, uuid, json, text[], json, double precision, double precision) is
    'Record the outcomes of calls. See sql/functions/settle.sql.';

-- Note the calls under way of items that an earlier attempt's answer is about to end (settle): lost, until they report.
-- p_held: the outcomes whose items the caller has locked. Not where the call itself has answered: then that one counts.
create or replace function supersede(
    p_workspace_id uuid, p_outcomes json, p_held int[], p_now timestamptz
)
returns void
language sql volatile
as $$
    with given as materialized (
        select p_workspace_id as workspace_id, g.batch_day, g.batch_id, c.seq, array_agg(c.attempt) as answered
        from json_to_recordset(p_outcomes) as g (
            batch_day date, batch_id uuid, ords int[], seqs int[], attempts int[], calls json
        )
        cross join lateral rows from (
            unnest(g.ords, g.seqs, g.attempts), json_to_recordset(g.calls) as (outcome attempt_outcome)
        ) as c (ord, seq, attempt, outcome)
        where c.outcome = 'answered' and c.ord = any (p_held)
        group by g.batch_day, g.batch_id, c.seq
    )
    insert into attempts (
        workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, worker_id,
        claimed_at, ended_at, error_code, error_message, reserved_limits, reserved_input_tokens,
        reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens,
        expected_output_tokens, reserved_cost_nano
    )
    select i.workspace_id, i.batch_day, i.batch_id, i.seq, i.attempt, 'lost', i.resource_id,
        i.worker_id, i.claimed_at, p_now, 'superseded',
        'an earlier attempt was answered during this call, which has not reported',
        i.reserved_limits, i.reserved_input_tokens, i.reserved_output_tokens, 1,
        i.reserved_input_tokens, i.reserved_output_tokens, i.expected_output_tokens,
        i.reserved_cost_nano
    from given g
    join items i on i.workspace_id = g.workspace_id
        and i.batch_day = g.batch_day
        and i.batch_id = g.batch_id
        and i.seq = g.seq
    where i.status = 'running' and i.attempt <> all (g.answered)
    on conflict do nothing
$$;
comment on function supersede(uuid, json, int[], timestamptz) is
    'Note calls as lost whose items an earlier attempt''s answer ends.';

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
