-- What a batch may spend: maxTokens and maxCost, a limit of its lifetime on its own scope.
--
-- The claim keeps that limit like any other: it reserves estimates, so the batch spends more only by what its
-- estimates fell short. A flow whose next item does not fit waits for the limit; settling wakes it when calls cost
-- less than reserved. When no call is out any more nothing can come back: then the batch pauses.
--
-- Lock order: flows → batches. Whoever resumes or changes the batch holds the same flows first.
create or replace function batch_pause_exhausted(p_workspace_id uuid, p_batch_id uuid)
returns boolean
language plpgsql volatile
as $$
declare
    v_now timestamptz := clock_timestamp();
    v_limit_id uuid;
    v_running bigint;
    v_day date;
    v_reason text;
begin
    perform 1 from flows f
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id
    order by f.resource_id
    for no key update;
    -- Every flow that still has work waits for the limit, and nothing is out.
    select sum(f.running),
        case when bool_and(f.waits_until = 'infinity' and f.waits_for is not null)
            filter (where f.pending > 0 and not f.is_paused and not f.is_cancelled)
            then (array_agg(f.waits_for) filter (where f.pending > 0 and not f.is_paused and not f.is_cancelled))[1]
        end
    into v_running, v_limit_id
    from flows f
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id and f.is_open;
    if v_limit_id is null or v_running > 0 then
        return false;
    end if;
    -- The one of which the greater share is used.
    select case when b.max_tokens is null
                or coalesce(g.cost_nano, 0)::double precision / b.max_cost_nano
                    >= coalesce(g.input_tokens + g.output_tokens, 0)::double precision / b.max_tokens
            then 'max-cost' else 'max-tokens' end
    into v_reason
    from limits l
    join batches b on b.workspace_id = l.workspace_id and b.batch_id = l.scope_id
    left join ledger g on g.workspace_id = l.workspace_id
        and g.limit_id = l.limit_id
        and g.slot_at = 'epoch'
    where l.workspace_id = p_workspace_id
        and l.limit_id = v_limit_id
        and l.scope_id = p_batch_id
        and coalesce(b.max_tokens, b.max_cost_nano) is not null;
    if not found then
        return false;
    end if;
    update flows f
    set is_paused = true, waits_until = '-infinity', waits_for = null
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id and f.is_open and not f.is_cancelled;
    update batches b
    set pause_reason = v_reason
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id
    returning b.batch_day into v_day;
    perform event_append(p_workspace_id, v_day, p_batch_id, 'batch-paused', null, v_now);
    return true;
end
$$;
comment on function batch_pause_exhausted(uuid, uuid) is
    'Pause a batch that has spent what it may, once nothing of it is out; whether it did.';

-- Enter into a batch's new limit of its lifetime what was used before there was one. The caller holds the
-- batch's mutex.
create or replace function batch_budget_seed(p_workspace_id uuid, p_batch_id uuid) returns void
language plpgsql volatile
as $$
begin
    insert into ledger (
        workspace_id, limit_id, slot_at, requests, input_tokens, output_tokens, expected_output_tokens, cost_nano
    )
    select l.workspace_id, l.limit_id, 'epoch', sum(a.charged_requests), sum(a.charged_input_tokens),
        sum(a.charged_output_tokens), sum(a.charged_output_tokens), sum(coalesce(a.cost_nano, 0))
    from limits l
    join batches b on b.workspace_id = l.workspace_id and b.batch_id = l.scope_id
    join attempts a on a.workspace_id = b.workspace_id
        and a.batch_day = b.batch_day
        and a.batch_id = b.batch_id
        and not a.reserved_limits @> array[l.limit_id]
    where l.workspace_id = p_workspace_id
        and l.scope_id = p_batch_id
        and l.period = 'lifetime'
        and not exists (
            select from ledger g
            where g.workspace_id = l.workspace_id and g.limit_id = l.limit_id and g.slot_at = 'epoch'
        )
    group by l.workspace_id, l.limit_id;
end
$$;
comment on function batch_budget_seed(uuid, uuid) is
    'Enter into a batch''s new limit of its lifetime what it had used before.';
