-- Erasure: prompts and answers go, facts stay (numbers, models, tokens, costs, errors, the creator's own ids).
--
-- Of items that have ended, some at a time; a request that may still be sent is needed. Both texts say null
-- afterwards, which is what readers show. p_seqs: only these items; null: all of the batch. Returns how many were
-- erased. Locks the requests' rows in key order, which nothing else does: claims only read them.
create or replace function texts_erase(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_seqs int[], p_most int
)
returns int
language plpgsql volatile
as $$
declare
    v_seqs int[];
begin
    with held as materialized (
        select q.seq
        from item_requests q
        join items i on i.workspace_id = q.workspace_id
            and i.batch_day = q.batch_day
            and i.batch_id = q.batch_id
            and i.seq = q.seq
        where q.workspace_id = p_workspace_id
            and q.batch_day = p_batch_day
            and q.batch_id = p_batch_id
            and q.erased_at is null
            and (p_seqs is null or q.seq = any (p_seqs))
            and i.status in ('completed', 'failed', 'cancelled')
        order by q.seq
        limit p_most
        for no key update of q skip locked
    )
    select array_agg(h.seq order by h.seq) into v_seqs from held h;
    if v_seqs is null then
        return 0;
    end if;
    update item_requests q
    set body = 'null', vmx = null, erased_at = clock_timestamp()
    where q.workspace_id = p_workspace_id
        and q.batch_day = p_batch_day
        and q.batch_id = p_batch_id
        and q.seq = any (v_seqs);
    update item_results r
    set body = case when r.body is not null then 'null'::json end, headers = null
    where r.workspace_id = p_workspace_id
        and r.batch_day = p_batch_day
        and r.batch_id = p_batch_id
        and r.seq = any (v_seqs);
    return cardinality(v_seqs);
end
$$;
comment on function texts_erase(uuid, date, uuid, int[], int) is
    'Erase prompts and answers of ended items, some at a time; how many.';

-- Delete the rows of a finished batch, some items at a time; how many items. The batch and its flows stay: they are its
-- summary. Locks items in key order; nothing else looks at ended items.
create or replace function facts_forget(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_most int
)
returns int
language plpgsql volatile
as $$
declare
    v_seqs int[];
begin
    -- Minutes must have been counted before their attempts go.
    if exists (select from rollup_due d where d.batch_day = p_batch_day) then
        return 0;
    end if;
    with held as materialized (
        select i.seq
        from items i
        where i.workspace_id = p_workspace_id
            and i.batch_day = p_batch_day
            and i.batch_id = p_batch_id
            and i.status in ('completed', 'failed', 'cancelled')
        order by i.seq
        limit p_most
        for update skip locked
    )
    select array_agg(h.seq order by h.seq) into v_seqs from held h;
    if coalesce(cardinality(v_seqs), 0) < p_most then
        delete from events e
        where e.workspace_id = p_workspace_id and e.batch_day = p_batch_day and e.batch_id = p_batch_id;
    end if;
    if v_seqs is null then
        return 0;
    end if;
    delete from items i
    where i.workspace_id = p_workspace_id
        and i.batch_day = p_batch_day
        and i.batch_id = p_batch_id
        and i.seq = any (v_seqs);
    delete from item_requests q
    where q.workspace_id = p_workspace_id
        and q.batch_day = p_batch_day
        and q.batch_id = p_batch_id
        and q.seq = any (v_seqs);
    delete from item_results r
    where r.workspace_id = p_workspace_id
        and r.batch_day = p_batch_day
        and r.batch_id = p_batch_id
        and r.seq = any (v_seqs);
    delete from attempts a
    where a.workspace_id = p_workspace_id
        and a.batch_day = p_batch_day
        and a.batch_id = p_batch_id
        and a.seq = any (v_seqs);
    return cardinality(v_seqs);
end
$$;
comment on function facts_forget(uuid, date, uuid, int) is
    'Delete the rows of a finished batch, some items at a time; how many items.';
