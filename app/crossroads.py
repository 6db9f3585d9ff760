"""Where the items of a new batch go: their resource's own model, or the one that its rules choose.

All that rules look at beside an item is read once per batch, and nothing at all for resources without
rules and secondary models.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from app import anthropic, capacity, resources
from app.db import Connection, Query
from app.presets import protocol_of
from app.resources import ModelAt, Resource
from app.routing import Facts, Rules, Surroundings, decide, parse

BLOCKED = "blocked_by_routing_condition"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossroads:
    """One resource's: its rules, what they look at, and the alternates that items may go to."""

    rules: Rules
    around: Surroundings
    targets: Mapping[ModelAt, Resource]
    secondary: Sequence[Resource]

    def choose(
        self,
        own: Resource,
        request: Mapping[str, object],
        *,
        input_tokens: int,
        batch_id: UUID,
        seq: int,
    ) -> Resource:
        """The resource of an item: ``own`` or an alternate. Raises ValueError with a sentence."""
        index = _secondary_index(request)
        if index is not None:
            if not 0 <= index < len(self.secondary):
                raise ValueError(
                    f"vmx.secondaryModelIndex is {index}, and resource '{own.name}' has "
                    f"{len(self.secondary)} secondary models"
                )
            return self.secondary[index]
        facts = Facts(request, input_tokens=input_tokens, around=self.around)
        rule = decide(self.rules, facts, batch_id=batch_id, seq=seq)
        if rule is None:
            return own
        if rule.target is None:
            why = f" ({rule.description})" if rule.description else ""
            raise ValueError(f"{BLOCKED}: rule {rule.number} of '{own.name}' refuses it{why}")
        at = ModelAt(model=rule.target.model, connection_id=rule.target.connection_id)
        # A rule whose model was taken away between its reading and now leads nowhere.
        return self.targets.get(at, own)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ErrorRate:
    calls: int
    failed: int


_error_rate = Query("resources", "error_rate", _ErrorRate)


async def crossroads(
    conn: Connection,
    *,
    workspace_id: UUID,
    of: Iterable[Resource],
    metadata: Mapping[str, object],
    guard_s: float,
) -> dict[UUID, Crossroads]:
    """The crossroads of those resources that have any, by id."""
    forked = [each for each in of if each.routing is not None or each.secondary_ids]
    if not forked:
        return {}
    alternates = await resources.alternates(
        conn, workspace_id=workspace_id, owner_ids=[each.resource_id for each in forked]
    )
    by_id = {each.resource_id: each for each in alternates}
    found: dict[UUID, Crossroads] = {}
    for each in forked:
        rules, _ = parse(each.routing)
        found[each.resource_id] = Crossroads(
            rules=rules,
            around=Surroundings(
                metadata=metadata, percents=await _percents(conn, each, rules, guard_s=guard_s)
            ),
            targets={a.at: a for a in alternates if a.owner_id == each.resource_id},
            secondary=[by_id[i] for i in each.secondary_ids],
        )
    return found


async def _percents(
    conn: Connection, of: Resource, rules: Rules, *, guard_s: float
) -> dict[str, float]:
    """Every error rate and use of limits that rules look at."""
    found: dict[str, float] = {}
    for minutes in sorted(rules.error_minutes):
        rate = await _error_rate.one(
            conn,
            workspace_id=of.workspace_id,
            resource_id=of.resource_id,
            minutes=minutes,
        )
        if rate.calls:
            found[f"errorRate({minutes})"] = 100 * rate.failed / rate.calls
    if rules.looks_at_capacity:
        scope_ids = await capacity.resource_scopes(
            conn, workspace_id=of.workspace_id, resource_id=of.resource_id
        )
        for limit in await capacity.usage(
            conn,
            workspace_id=of.workspace_id,
            scope_ids=scope_ids,
            guard_s=guard_s,
            with_reserved=False,
        ):
            name = f"capacityUsage({limit.period})"
            used = limit.used
            for kind, most in limit.bounds.items():
                found[name] = max(found.get(name, 0.0), 100 * used[kind] / most)
    return found


def _secondary_index(request: Mapping[str, object]) -> int | None:
    match request.get("vmx"):
        case {"secondaryModelIndex": int() as index} if not isinstance(index, bool):
            return index
        case _:
            return None


def require_translatable(of: Resource, endpoint: str, request: Mapping[str, object]) -> None:
    """Raise ValueError for a request that the resource's provider cannot be asked."""
    if protocol_of(of.provider) == "anthropic":
        if endpoint != "/v1/chat/completions":
            raise ValueError(f"Anthropic's API serves chat completions, not {endpoint}")
        anthropic.check(request)
