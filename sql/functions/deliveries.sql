-- deliveries: an outbox. A row per event and endpoint is written in the transaction that writes the event, so
-- that an event is told of if and only if it happened. A sender (app/sender.py) posts them, at least once each.
--
-- Two kinds of endpoint. A CALLBACK batch has one of its own (endpoint_id = batch_id), which is told of its items
-- and of its end. An environment has any number of standing ones (webhooks), which are told of the end of every
-- batch. A batch without a callback, in an environment without webhooks, costs one look-up at its end.
--
-- The mutex. All that changes deliveries (claim, settle, redeliver, disable) holds the row of their endpoint and
-- looks after it has it. The row also says from when on looking is worth it (next_at), which a new delivery moves
-- to now. Of a callback the endpoint is locked right after its batch, which whoever appends an event has locked:
-- nobody else wants both, so that order cannot cross. A standing endpoint belongs to many batches; waiting for it
-- between two batches could close a circle, so it is only locked if that can be had at once. If not, somebody is
-- changing it at this moment, who may not see our row; the sender's look every few seconds finds it.
--
-- Order. The end of a batch is told to its callback when no delivery of an item's event before it is pending.
create or replace function deliveries_append(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_environment_id uuid, p_has_callback boolean,
    p_kind event_kind, p_seqs int[], p_first_no bigint, p_at timestamptz
)
returns void
language plpgsql volatile
as $$
declare
    v_wanted text[];
    v_disabled_reason text;
    v_topic text := delivery_topic(p_kind);
begin
    if p_has_callback then
        select e.event_types, e.disabled_reason into v_wanted, v_disabled_reason
        from endpoints e
        where e.workspace_id = p_workspace_id and e.endpoint_id = p_batch_id
        for no key update;
        if v_topic = any (v_wanted) then
            insert into deliveries (
                workspace_id, batch_day, batch_id, event_no, endpoint_id, seq, kind, topic, visible_at,
                created_at, status, reason, ended_at
            )
            select p_workspace_id, p_batch_day, p_batch_id, p_first_no + u.place - 1, p_batch_id, u.seq, p_kind,
                v_topic, p_at, p_at, case when v_disabled_reason is null then 'pending' else 'dead' end::delivery_status,
                v_disabled_reason, case when v_disabled_reason is not null then p_at end
            from unnest(coalesce(p_seqs, array[null::int])) with ordinality as u (seq, place);
            update endpoints e
            set next_at = p_at
            where e.workspace_id = p_workspace_id
                and e.endpoint_id = p_batch_id
                and e.disabled_at is null
                and e.next_at > p_at;
        end if;
    end if;
    if p_kind in ('batch-completed', 'batch-failed', 'batch-cancelled') then
        perform webhooks_append(p_workspace_id, p_environment_id, p_batch_day, p_batch_id, p_kind, p_first_no,
            (
                select case
                    when p_kind = 'batch-cancelled' then 'batch.cancelled'
                    when b.expired_at is not null then 'batch.expired'
                    else 'batch.completed'
                end
                from batches b
                where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id
            ),
            p_at);
    end if;
end
$$;
comment on function deliveries_append(uuid, date, uuid, uuid, boolean, event_kind, int[], bigint, timestamptz) is
    'Write the deliveries of events just appended; the caller holds the batch.';

-- Tell the standing endpoints of an environment. Topics are OpenAI's states, as /v1/batches shows them: a batch of
-- which everything was tried is completed, however much of it failed; failed is one that was refused as a whole,
-- and so never became rows of batches (then p_event_no is 0).
create or replace function webhooks_append(
    p_workspace_id uuid, p_environment_id uuid, p_batch_day date, p_batch_id uuid, p_kind event_kind,
    p_event_no bigint, p_topic text, p_at timestamptz
)
returns void
language plpgsql volatile
as $$
begin
    insert into deliveries (
        workspace_id, batch_day, batch_id, event_no, endpoint_id, kind, topic, visible_at, created_at, status,
        reason, ended_at
    )
    select p_workspace_id, p_batch_day, p_batch_id, p_event_no, e.endpoint_id, p_kind, p_topic, p_at, p_at,
        case when e.disabled_at is null then 'pending' else 'dead' end::delivery_status, e.disabled_reason,
        case when e.disabled_at is not null then p_at end
    from endpoints e
    where e.workspace_id = p_workspace_id
        and e.environment_id = p_environment_id
        and e.batch_id is null
        and p_topic = any (e.event_types);
    if not found then
        return;
    end if;
    with free as (
        select e.endpoint_id
        from endpoints e
        where e.workspace_id = p_workspace_id
            and e.environment_id = p_environment_id
            and e.batch_id is null
            and e.disabled_at is null
            and e.next_at > p_at
            and p_topic = any (e.event_types)
        order by e.endpoint_id
        for no key update skip locked
    )
    update endpoints e
    set next_at = p_at
    from free
    where e.workspace_id = p_workspace_id and e.endpoint_id = free.endpoint_id;
end
$$;
comment on function webhooks_append(uuid, uuid, date, uuid, event_kind, bigint, text, timestamptz) is
    'Write the deliveries of a batch''s end to the webhooks of its environment.';

create or replace function delivery_topic(p_kind event_kind) returns text
language sql immutable
as $$
    select case
        when p_kind in ('item-completed', 'item-failed', 'item-cancelled') then 'item_update'
        when p_kind = 'item-running' then 'item_running'
        when p_kind in ('batch-completed', 'batch-failed', 'batch-cancelled') then 'batch_update'
    end
$$;
comment on function delivery_topic(event_kind) is 'What a callback subscribes to, to be told of an event; null: it never is.';

-- Make it known from when on an endpoint has something to claim. The caller holds its row.
create or replace function endpoint_rest(p_workspace_id uuid, p_endpoint_id uuid) returns timestamptz
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    v_is_callback boolean;
    v_next_at timestamptz;
    v_batch_at timestamptz;
begin
    select e.batch_id is not null into v_is_callback
    from endpoints e
    where e.workspace_id = p_workspace_id and e.endpoint_id = p_endpoint_id;
    select d.visible_at into v_next_at
    from deliveries d
    where d.workspace_id = p_workspace_id
        and d.endpoint_id = p_endpoint_id
        and d.status = 'pending'
        and d.seq is not null
    order by d.visible_at, d.event_no
    limit 1;
    select min(d.visible_at) into v_batch_at
    from deliveries d
    where d.workspace_id = p_workspace_id
        and d.endpoint_id = p_endpoint_id
        and d.status = 'pending'
        and d.seq is null
        and not (v_is_callback and delivery_waits(d.workspace_id, d.endpoint_id, d.batch_day, d.event_no));
    v_next_at := coalesce(least(v_next_at, v_batch_at), 'infinity');
    update endpoints e
    set next_at = v_next_at
    where e.workspace_id = p_workspace_id
        and e.endpoint_id = p_endpoint_id
        and e.next_at is distinct from v_next_at;
    return v_next_at;
end
$$;
comment on function endpoint_rest(uuid, uuid) is 'Note from when on an endpoint has something to claim.';

create or replace function delivery_waits(
    p_workspace_id uuid, p_endpoint_id uuid, p_batch_day date, p_event_no bigint
)
returns boolean
language sql stable
as $$
    select exists (
        select from deliveries d
        where d.workspace_id = p_workspace_id
            and d.endpoint_id = p_endpoint_id
            and d.batch_day = p_batch_day
            and d.status = 'pending'
            and d.seq is not null
            and d.event_no < p_event_no
    )
$$;
comment on function delivery_waits(uuid, uuid, date, bigint) is
    'Whether the end of a callback''s batch waits for deliveries of its items.';
