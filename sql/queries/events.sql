-- Events of a batch.

-- name: events_after
-- Rows of events after a number, in order. A row may begin before it: the reader skips what it has seen.
select first_no, last_no, kind::text as kind, at, seqs
from events
where workspace_id = %(workspace_id)s
    and batch_day = %(batch_day)s
    and batch_id = %(batch_id)s
    and last_no > %(after)s
order by last_no
limit %(most)s;
