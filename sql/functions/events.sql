-- Append events to batches whose row locks the caller holds: of each entry one event per item of its seqs, or one of
-- the batch itself (null); within a batch in the given order. Numbers are found by a backward probe of the key under
-- those locks, so no counter row is rewritten by every exchange. Whoever is to be told gets a delivery with them.
create or replace function events_append(p_workspace_id uuid, p_happened happening[], p_at timestamptz)
returns void
language plpgsql volatile
as $$
declare
    v_told record;
begin
    for v_told in
        with written as (
            insert into events (workspace_id, batch_day, batch_id, first_no, last_no, kind, at, seqs)
            select h.workspace_id, h.batch_day, h.batch_id, last.no + h.until - h.events + 1, last.no + h.until, h.kind, p_at,
                h.seqs
            from (
                select p_workspace_id as workspace_id, e.*,
                    sum(e.events) over (partition by e.batch_id order by e.ordinality) as until
                from (
                    select u.*, coalesce(cardinality(u.seqs), 1) as events
                    from unnest(p_happened) with ordinality u
                ) e
            ) h
            cross join lateral (
                select coalesce((
                    select e.last_no
                    from events e
                    where e.workspace_id = h.workspace_id and e.batch_day = h.batch_day and e.batch_id = h.batch_id
                    order by e.last_no desc
                    limit 1
                ), 0) as no
            ) last
            returning events.batch_day, events.batch_id, events.first_no, events.kind, events.seqs
        )
        select w.batch_day, w.batch_id, w.first_no, w.kind, w.seqs, b.environment_id,
            b.callback_options is not null as has_callback
        from written w
        join batches b on b.workspace_id = p_workspace_id and b.batch_id = w.batch_id
        where b.callback_options is not null
            or w.kind in ('batch-completed', 'batch-failed', 'batch-cancelled')
        order by w.batch_id, w.first_no
    loop
        perform deliveries_append(p_workspace_id, v_told.batch_day, v_told.batch_id, v_told.environment_id,
            v_told.has_callback, v_told.kind, v_told.seqs, v_told.first_no, p_at);
    end loop;
end
$$;
comment on function events_append(uuid, happening[], timestamptz) is
    'Append events to batches whose row locks the caller holds.';

-- The same of one batch, for those who do not hold it yet: takes its row lock and keeps it to the end of the
-- transaction. Returns the number of the last event; null if there is nothing to tell.
create or replace function event_append(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_kind event_kind, p_seqs int[],
    p_at timestamptz
)
returns bigint
language plpgsql volatile
as $$
begin
    if p_seqs = '{}' then
        return null;
    end if;
    perform 1 from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id
    for no key update;
    perform events_append(p_workspace_id, array[row(p_batch_day, p_batch_id, p_kind, p_seqs)::happening], p_at);
    return (
        select max(e.last_no)
        from events e
        where e.workspace_id = p_workspace_id and e.batch_day = p_batch_day and e.batch_id = p_batch_id
    );
end
$$;
comment on function event_append(uuid, date, uuid, event_kind, int[], timestamptz) is
    'Lock a batch and append events to it; the number of the last one, or null.';
