-- Output and error files of batches, whose lines are made from rows: where they are, and what they say.
--
-- A line belongs to an event: the one that ended its item, which is the one of the item's own time. After failed
-- items were put back, their older events end nothing any more.

-- name: result_owner
-- The batch that a file of its own belongs to: their ids differ in the low 32 bits only. Reads a range of the key.
select b.workspace_id, b.batch_id, b.batch_day, b.endpoint, b.redrives,
    b.completed_at is not null as is_finished, b.created_at, s.output_expires_s, f.output_lines, f.error_lines,
    f.resource_ids
from batches b
left join submissions s on s.workspace_id = b.workspace_id and s.batch_id = b.batch_id
cross join lateral (
    select sum(f.completed)::int as output_lines,
        sum(f.failed + f.cancelled - f.unmarked)::int as error_lines, array_agg(f.resource_id) as resource_ids
    from flows f
    where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id
) f
where b.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and b.batch_id between %(from_id)s and %(to_id)s
order by b.batch_id
limit 1;

-- name: result_files_page
-- Output and error files that have lines, newest batch first or last, beyond a given id.
select v.file_id
from batches b
cross join lateral (
    select sum(f.completed) > 0 as has_output, sum(f.failed + f.cancelled - f.unmarked) > 0 as has_errors,
        bool_and(%(resource_ids)s::uuid[] is null or f.resource_id = any (%(resource_ids)s::uuid[])) as is_allowed
    from flows f
    where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id
) f
cross join lateral (
    values ('output'::result_kind, f.has_output), ('error', f.has_errors)
) k (kind, has_lines)
cross join lateral (select result_file_id(b.batch_id, k.kind, b.redrives) as file_id) v
where b.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and k.has_lines
    and f.is_allowed
    and (%(after)s::uuid is null
        or case when %(newest_first)s then v.file_id < %(after)s::uuid else v.file_id > %(after)s::uuid end)
    and not exists (
        select from result_files r
        where r.workspace_id = b.workspace_id
            and r.batch_id = b.batch_id
            and r.kind = k.kind
            and r.deleted_at is not null
    )
order by case when %(newest_first)s then v.file_id end desc, v.file_id
limit %(most)s;

-- name: result_file_get
-- How far a file has been measured, and how far it can be: the number of the batch's last event.
select coalesce(r.bytes, 0) as bytes, coalesce(r.indexed_no, 0) as indexed_no, r.begun_at, r.deleted_at, e.last_no,
    clock() as now
from (
    select coalesce(max(e.last_no), 0) as last_no
    from events e
    where e.workspace_id = %(workspace_id)s and e.batch_day = %(batch_day)s and e.batch_id = %(batch_id)s
) e
left join result_files r on r.workspace_id = %(workspace_id)s
    and r.batch_id = %(batch_id)s
    and r.kind = %(kind)s::result_kind;

-- name: result_file_make
-- Begin to measure a file.
insert into result_files (workspace_id, batch_id, kind)
values (%(workspace_id)s, %(batch_id)s, %(kind)s::result_kind)
on conflict do nothing;

-- name: result_file_lock
-- Lock a file's row: one at a time measures on. How far it has come.
select bytes, indexed_no
from result_files
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s and kind = %(kind)s::result_kind
for no key update;

-- name: result_file_extend
-- Note what was measured: the sizes of whole parts, each after the other, up to an event's number.
with parts as (
    insert into result_parts (workspace_id, batch_id, kind, begin, bytes, first_no, last_no)
    select %(workspace_id)s, %(batch_id)s, %(kind)s::result_kind, g.begin, g.bytes, g.first_no, g.last_no
    from unnest(%(begins)s::bigint[], %(sizes)s::bigint[], %(first_nos)s::bigint[], %(last_nos)s::bigint[])
        as g (begin, bytes, first_no, last_no)
)
update result_files
set bytes = %(bytes)s, indexed_no = %(indexed_no)s, begun_at = coalesce(begun_at, %(begun_at)s)
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s and kind = %(kind)s::result_kind;

-- name: result_file_delete
-- Show a file no more; 0 when that is so already.
update result_files
set deleted_at = clock_timestamp()
where workspace_id = %(workspace_id)s
    and batch_id = %(batch_id)s
    and kind = %(kind)s::result_kind
    and deleted_at is null;

-- name: result_files_forget
-- Forget where the lines of batches were that are gone themselves.
delete from result_files r
where not exists (
    select from batches b where b.workspace_id = r.workspace_id and b.batch_id = r.batch_id
);

-- name: result_parts_from
-- The part that holds an offset, and those after it.
select begin, bytes, first_no, last_no
from result_parts
where workspace_id = %(workspace_id)s
    and batch_id = %(batch_id)s
    and kind = %(kind)s::result_kind
    and begin >= coalesce((
        select max(p.begin)
        from result_parts p
        where p.workspace_id = %(workspace_id)s
            and p.batch_id = %(batch_id)s
            and p.kind = %(kind)s::result_kind
            and p.begin <= %(at)s
    ), 0)
order by begin
limit %(most)s;

-- name: result_sizes
-- The lines of the events after a number, each with its size; one row without a line for events that have none.
with told as materialized (
    select e.first_no, e.last_no, e.kind, e.at, e.seqs
    from events e
    where e.workspace_id = %(workspace_id)s
        and e.batch_day = %(batch_day)s
        and e.batch_id = %(batch_id)s
        and e.last_no > %(after)s
    order by e.last_no
    limit %(most_rows)s
)
select t.last_no as event_no, t.at, l.no, l.bytes
from told t
left join lateral (
    select t.first_no + u.k - 1 as no,
        octet_length(r.head) + octet_length(r.tail) + coalesce(octet_length(r.body), 0) as bytes
    from unnest(t.seqs) with ordinality as u (seq, k)
    cross join lateral (
        select i.status
        from items i
        where i.workspace_id = %(workspace_id)s
            and i.batch_day = %(batch_day)s
            and i.batch_id = %(batch_id)s
            and i.seq = u.seq
            and i.ended_at = t.at
        limit 1
    ) i
    cross join lateral result_line(%(workspace_id)s, %(batch_day)s, %(batch_id)s, u.seq, i.status) r
    where t.kind::text = 'item-' || i.status::text
) l on t.kind::text = any (%(kinds)s::text[])
order by t.last_no, l.no;

-- name: result_lines
-- The lines of the events from one number to another, in order. Line breaks in a provider's reply, which can only
-- stand between its tokens, become spaces.
select t.first_no + u.k - 1 as no, i.status = 'completed' as is_answered,
    convert_to(r.head || coalesce(translate(r.body, E'\n\r', '  '), '') || r.tail, 'UTF8') as line
from events t
cross join lateral unnest(t.seqs) with ordinality as u (seq, k)
cross join lateral (
    select i.status
    from items i
    where i.workspace_id = t.workspace_id
        and i.batch_day = %(batch_day)s
        and i.batch_id = t.batch_id
        and i.seq = u.seq
        and i.ended_at = t.at
    limit 1
) i
cross join lateral result_line(t.workspace_id, %(batch_day)s, t.batch_id, u.seq, i.status) r
where t.workspace_id = %(workspace_id)s
    and t.batch_day = %(batch_day)s
    and t.batch_id = %(batch_id)s
    and t.last_no >= %(from_no)s
    and t.first_no <= %(to_no)s
    and t.first_no + u.k - 1 between %(from_no)s and %(to_no)s
    and t.kind::text = any (%(kinds)s::text[])
    and t.kind::text = 'item-' || i.status::text
order by t.last_no, u.k
limit %(most)s;

-- name: result_lines_by_input
-- The same lines in the order of the input, of the items from a number on.
select i.seq::bigint as no, i.status = 'completed' as is_answered,
    convert_to(r.head || coalesce(translate(r.body, E'\n\r', '  '), '') || r.tail, 'UTF8') as line
from items i
cross join lateral result_line(i.workspace_id, %(batch_day)s, i.batch_id, i.seq, i.status) r
where i.workspace_id = %(workspace_id)s
    and i.batch_day = %(batch_day)s
    and i.batch_id = %(batch_id)s
    and i.seq >= %(from_no)s
    and 'item-' || i.status::text = any (%(kinds)s::text[])
order by i.seq
limit %(most)s;

-- name: request_lines
-- Requests as lines of an input file, from an item's number on: of batches that were not made from a file.
select q.seq::bigint as no, false as is_answered,
    convert_to(
        '{"custom_id":' || to_json(coalesce(q.custom_id, item_id(q.batch_id, q.seq)::text))::text
        || ',"method":"POST","url":' || to_json(%(endpoint)s::text)::text || ',"body":'
        || translate(q.body::text, E'\n\r', '  ') || '}' || E'\n', 'UTF8') as line
from item_requests q
where q.workspace_id = %(workspace_id)s
    and q.batch_day = %(batch_day)s
    and q.batch_id = %(batch_id)s
    and q.seq >= %(from_no)s
order by q.seq
limit %(most)s;

-- name: request_bytes
-- The size of all of these lines.
select coalesce(sum(octet_length(
    '{"custom_id":' || to_json(coalesce(q.custom_id, item_id(q.batch_id, q.seq)::text))::text
    || ',"method":"POST","url":' || to_json(%(endpoint)s::text)::text || ',"body":}' || E'\n')
    + octet_length(q.body::text)), 0)::bigint as bytes
from item_requests q
where q.workspace_id = %(workspace_id)s and q.batch_day = %(batch_day)s and q.batch_id = %(batch_id)s;
