-- Stored files: written in pieces while they arrive, each in a transaction of its own, so that no long upload holds
-- back what vacuum may clean.

-- name: file_begin
-- A file that is about to arrive; nobody sees it yet.
insert into files (workspace_id, file_id, environment_id)
values (%(workspace_id)s, %(file_id)s, %(environment_id)s);

-- name: file_chunk_append
-- One more piece. Fails when the upload was given up for lost.
insert into file_chunks (workspace_id, file_id, no, data)
values (%(workspace_id)s, %(file_id)s, %(no)s, %(data)s);

-- name: file_finish
-- The file is complete; it is seen from now on. Expires after so many seconds; null: never.
update files
set purpose = %(purpose)s, filename = %(filename)s, bytes = %(bytes)s, uploaded_at = clock_timestamp(),
    expires_at = clock_timestamp() + make_interval(secs => %(expires_s)s::double precision)
where workspace_id = %(workspace_id)s and file_id = %(file_id)s and uploaded_at is null
returning workspace_id, file_id, purpose, filename, bytes, uploaded_at as created_at, expires_at;

-- name: file_get
-- A complete file that has not expired.
select workspace_id, file_id, purpose, filename, bytes, uploaded_at as created_at, expires_at
from files
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and file_id = %(file_id)s
    and uploaded_at is not null
    and (expires_at is null or expires_at > clock());

-- name: files_page
-- Complete files, newest first or last, beyond a given id.
select workspace_id, file_id, purpose, filename, bytes, uploaded_at as created_at, expires_at
from files
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and uploaded_at is not null
    and (expires_at is null or expires_at > clock())
    and (%(purpose)s::text is null or purpose = %(purpose)s)
    and (%(after)s::uuid is null
        or case when %(newest_first)s then file_id < %(after)s::uuid else file_id > %(after)s::uuid end)
order by case when %(newest_first)s then file_id end desc, file_id
limit %(most)s;

-- name: file_delete
-- Delete a file with its pieces.
delete from files
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s and file_id = %(file_id)s;

-- name: file_chunk_get
-- A range of one piece: so many bytes from an offset in it.
select substring(data from %(at)s::int + 1 for %(bytes)s::int) as data
from file_chunks
where workspace_id = %(workspace_id)s and file_id = %(file_id)s and no = %(no)s;

-- name: files_prune
-- Delete some files that have expired, or whose upload was broken off long ago. Skips what is locked.
with gone as (
    select workspace_id, file_id
    from files
    where expires_at <= clock()
        or uploaded_at is null and begun_at < clock() - make_interval(hours => %(abandoned_hours)s)
    limit %(most)s
    for update skip locked
)
delete from files f
using gone g
where f.workspace_id = g.workspace_id and f.file_id = g.file_id;
