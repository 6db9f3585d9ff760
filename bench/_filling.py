"""Batches by the thousand and items by the million, made by SQL in the state they would be in.

What the API and the workers would have written, in the same tables, minus the time they would take.
"""

from collections.abc import Mapping, Sequence
from typing import Any, LiteralString
from uuid import UUID

from app import intake
from app.db import Connection
from app.ids import uuid7
from app.intake import NewBatch

_BODY = '{"messages":[{"role":"user","content":"Where is my card?"}],"max_tokens":64}'
_ANSWER = (
    '{"id":"x","choices":[{"message":{"content":"In the post."}}],"usage":{"prompt_tokens":9}}'
)
_MOST_ROWS = 200_000

_BATCHES: LiteralString = """
insert into batches (workspace_id, batch_id, environment_id, batch_day, type, status, total_items,
    estimated_input_tokens, started_at, completed_at)
select %(workspace_id)s, b, %(environment_id)s, %(batch_day)s, 'async',
    case when %(done)s then 'completed' else 'pending' end::work_status, %(items)s, 10 * %(items)s,
    case when %(done)s then now() end, case when %(done)s then now() end
from unnest(%(batch_ids)s::uuid[]) b
"""
_FLOWS: LiteralString = """
insert into flows (workspace_id, batch_id, resource_id, batch_day, is_open, virtual_time, total, unstarted,
    pending, completed, floor)
select %(workspace_id)s, b, %(resource_id)s, %(batch_day)s, not %(done)s, 0, %(items)s,
    case when %(done)s then 0 else %(items)s end, case when %(done)s then 0 else %(items)s end,
    case when %(done)s then %(items)s else 0 end, case when %(done)s then %(items)s else 0 end
from unnest(%(batch_ids)s::uuid[]) b
"""
_ITEMS: LiteralString = """
insert into items (workspace_id, batch_day, batch_id, resource_id, seq, input_tokens, max_output_tokens, status,
    attempt, ended_reason, ended_at)
select %(workspace_id)s, %(batch_day)s, b, %(resource_id)s, n, 10, 64,
    case when %(done)s then 'completed' else 'pending' end::work_status, %(done)s::int,
    case when %(done)s then 'answered' end::ended_reason, case when %(done)s then now() end
from unnest(%(batch_ids)s::uuid[]) b cross join generate_series(0, %(items)s - 1) n
"""
_REQUESTS: LiteralString = """
insert into item_requests (workspace_id, batch_day, batch_id, seq, body)
select %(workspace_id)s, %(batch_day)s, b, n, %(body)s::json
from unnest(%(batch_ids)s::uuid[]) b cross join generate_series(0, %(items)s - 1) n
"""
_RESULTS: LiteralString = """
insert into item_results (workspace_id, batch_day, batch_id, seq, attempt, ended_at, status_code, input_tokens,
    output_tokens, model, body)
select %(workspace_id)s, %(batch_day)s, b, n, 1, now(), 200, 10, 5, 'sluice-bench', %(answer)s::json
from unnest(%(batch_ids)s::uuid[]) b cross join generate_series(0, %(items)s - 1) n
"""
_ATTEMPTS: LiteralString = """
insert into attempts (workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, worker_id, claimed_at,
    started_at, ended_at, latency_ms, status_code, reserved_limits, reserved_input_tokens,
    reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens)
select %(workspace_id)s, %(batch_day)s, b, n, 1, 'answered', %(resource_id)s, %(resource_id)s, now(), now(),
    now(), 200, 200, '{}', 10, 64, 1, 10, 5
from unnest(%(batch_ids)s::uuid[]) b cross join generate_series(0, %(items)s - 1) n
"""
_EVENTS: LiteralString = """
insert into events (workspace_id, batch_day, batch_id, first_no, last_no, kind, at, seqs)
select %(workspace_id)s, %(batch_day)s, b, 1, 1, 'batch-created'::event_kind, now(), null::int[]
from unnest(%(batch_ids)s::uuid[]) b
union all
select %(workspace_id)s, %(batch_day)s, b, 2 + 50 * n, 51 + 50 * n, 'item-completed'::event_kind, now(),
    array(select generate_series(50 * n, 50 * n + 49))
from unnest(%(batch_ids)s::uuid[]) b cross join generate_series(0, %(items)s / 50 - 1) n
where %(done)s
"""
_READY: LiteralString = """
insert into ready (workspace_id, resource_id, next_at) values (%(workspace_id)s, %(resource_id)s, now())
on conflict (workspace_id, resource_id) do update set next_at = excluded.next_at, reason = null, waits_for = null
"""


async def fill(
    conn: Connection,
    ids: Mapping[str, Any],
    resource_id: UUID,
    *,
    number: int,
    items: int,
    done: bool = False,
) -> Sequence[UUID]:
    """So many batches of so many items, all pending or all answered; their ids, oldest first.

    ``ids``: the tenant and its environment. The connection is in autocommit.
    """
    made: list[UUID] = []
    at_once = max(_MOST_ROWS // items, 1)
    while len(made) < number:
        first = NewBatch(type="async", **ids)
        await intake.prepare_day(conn, first)
        some = [uuid7() for _ in range(min(at_once, number - len(made)))]
        params = {
            **ids,
            "resource_id": resource_id,
            "batch_day": first.batch_day,
            "batch_ids": some,
            "items": items,
            "done": done,
            "body": _BODY,
            "answer": _ANSWER,
        }
        async with conn.transaction():
            for statement in (_BATCHES, _FLOWS, _ITEMS, _REQUESTS):
                await conn.execute(statement, params)
            for statement in (_RESULTS, _ATTEMPTS) if done else (_READY,):
                await conn.execute(statement, params)
            await conn.execute(_EVENTS, params)
        made += some
    return made
