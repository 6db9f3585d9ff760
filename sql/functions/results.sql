-- Output and error files of a batch are not stored: their lines are made from items and results when somebody
-- reads them. A line is made here and nowhere else, so it has the same bytes whenever it is made.

-- A line of the file that an item of this state belongs to, in three parts: what is before the provider's reply, the
-- reply as it is stored, and what is after it. So its size is known without reading the reply, which may be large
-- and lie elsewhere. Three kinds of lines: answered; refused (response is the refusal); not executed or without a
-- usable reply (response is null, and error says why).
create or replace function result_line(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_seq int, p_status work_status
)
returns table (head text, body text, tail text)
language sql stable
as $$
    select
        '{"id":"batch_req_' || replace(item_id(p_batch_id, p_seq)::text, '-', '') || '","custom_id":'
        || to_json(coalesce(q.custom_id, item_id(p_batch_id, p_seq)::text))::text || ',"response":'
        || case
            when not k.has_response then
                'null,"error":' || case
                    when p_status = 'cancelled' then
                        '{"code":"batch_cancelled","message":'
                        '"This request was not executed, because the batch was cancelled."}'
                    when a.error_code = 'EXPIRED' then
                        '{"code":"batch_expired","message":'
                        '"This request could not be executed before the completion window expired."}'
                    else
                        '{"code":' || to_json(lower(coalesce(a.error_code, 'failed')))::text
                        || ',"message":' || to_json(coalesce(a.error_message, ''))::text || '}'
                end || '}' || E'\n'
            else
                '{"status_code":' || a.status_code || ',"request_id":'
                || to_json(coalesce(a.headers ->> 'x-request-id', a.headers ->> 'request-id', ''))::text
                || ',"body":' || case when a.body is not null then '' else
                    '{"error":{"message":' || to_json(coalesce(a.error_message, ''))::text || ',"type":'
                    || case
                        when a.status_code = 401 then '"authentication_error"'
                        when a.status_code = 403 then '"permission_error"'
                        when a.status_code = 429 then '"rate_limit_error"'
                        when a.status_code >= 500 then '"server_error"'
                        else '"invalid_request_error"'
                    end || ',"param":null,"code":' || coalesce(to_json(a.error_code)::text, 'null') || '}}'
                end
        end,
        case when k.has_response then a.body end,
        case when k.has_response then '},"error":null}' || E'\n' else '' end
    from (
        select q.custom_id
        from item_requests q
        where q.workspace_id = p_workspace_id
            and q.batch_day = p_batch_day
            and q.batch_id = p_batch_id
            and q.seq = p_seq
        limit 1
    ) q
    left join lateral (
        select a.body::text as body, a.headers, a.error_code, a.error_message,
            coalesce(a.status_code, case when p_status = 'completed' then 200::smallint end) as status_code
        from item_results a
        where a.workspace_id = p_workspace_id
            and a.batch_day = p_batch_day
            and a.batch_id = p_batch_id
            and a.seq = p_seq
        limit 1
    ) a on true
    cross join lateral (
        select coalesce(p_status = 'completed' or a.status_code >= 300, false) as has_response
    ) k
$$;
comment on function result_line(uuid, date, uuid, int, work_status) is
    'The line of an item in its batch''s output or error file, in three parts.';

-- The id of a batch's own file: like an item's, it differs from the batch's in the low 32 bits only, by a number
-- that no item has. The same as app/ids.py.
create or replace function result_file_id(p_batch_id uuid, p_kind result_kind, p_redrives int) returns uuid
language sql immutable strict parallel safe
as $$
    select item_id(p_batch_id, case p_kind when 'output' then -2 else -1073741825 + p_redrives end)
$$;
comment on function result_file_id(uuid, result_kind, int) is
    'The id of a batch''s output file, or of its error file since so many redrives.';
