-- Append one row of events to a batch: one event per item of p_seqs, or one of the batch itself.
-- Takes the batch's row lock and keeps it to the end of the transaction; the number is found by a
-- backward probe of the key under that lock, so no counter row is rewritten by every exchange.
create or replace function event_append(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_kind event_kind, p_seqs int[],
    p_at timestamptz
)
returns bigint
language plpgsql volatile
as $$
declare
    v_last bigint;
begin
    if p_seqs = '{}' then
        return null;
    end if;
    perform 1 from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id
    for no key update;
    select e.last_no into v_last
    from events e
    where e.workspace_id = p_workspace_id
        and e.batch_day = p_batch_day
        and e.batch_id = p_batch_id
    order by e.last_no desc
    limit 1;
    v_last := coalesce(v_last, 0);
    insert into events (workspace_id, batch_day, batch_id, first_no, last_no, kind, at, seqs)
    values (p_workspace_id, p_batch_day, p_batch_id, v_last + 1,
        v_last + coalesce(cardinality(p_seqs), 1), p_kind, p_at, p_seqs);
    return v_last + coalesce(cardinality(p_seqs), 1);
end
$$;
comment on function event_append(uuid, date, uuid, event_kind, int[], timestamptz) is
    'Append events to a batch, numbered under its row lock.';
