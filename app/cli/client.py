"""A Sluice server as the command line sees it, over HTTP."""

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Final, Literal, Self, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import msgspec

from app.cli.progress import Progress, Snapshot, duration
from app.cli.store import bootstrap_key_file, read_bootstrap_key
from app.errors import SluiceError, UsageError
from app.settings import Settings

#: A server may need minutes to take in a hundred megabytes.
_TIMEOUT: Final = httpx.Timeout(60, connect=10, read=900)
_LOOK_S: Final = 1.0
#: A server that restarts is waited for so long.
_PATIENCE_S: Final = 60.0
_PAGE: Final = 1000
_UNAUTHENTICATED: Final = 401
_KINDS: Final = {"inputTokens": "input tokens", "outputTokens": "output tokens"}

Decoded = TypeVar("Decoded")

Kind = Literal["connection", "resource"]
JsonObject = dict[str, object]

Status = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"]


class WhoAmI(msgspec.Struct, rename="camel"):
    """What the key opens."""

    workspace_id: UUID
    environment_id: UUID


class Scope(msgspec.Struct, rename="camel"):
    """What a limit is set on."""

    kind: str
    name: str | None = None
    dimension_field: str | None = None
    dimension_value: str | None = None

    def __str__(self) -> str:
        if self.kind == "value":
            what = self.dimension_field or "client address"
            return f"{what} '{self.dimension_value or ''}'"
        kind = "API key" if self.kind == "api-key" else self.kind
        return f"{kind} '{self.name}'" if self.name else f"this {kind}"


class Limit(msgspec.Struct, rename="camel"):
    """A limit and which of its kinds."""

    period: str
    kind: str
    amount: int
    scope: Scope

    def __str__(self) -> str:
        kind = _KINDS.get(self.kind, self.kind)
        return f"the limit of {self.amount:,} {kind} per {self.period} of {self.scope}"


class Waiting(msgspec.Struct, rename="camel"):
    """Why nothing of a batch can be begun now."""

    reason: str
    scope: Scope | None = None
    limit: Limit | None = None
    until: str | None = None
    items_ahead: int = 0

    def __str__(self) -> str:
        match self.reason:
            case "CAPACITY" | "PACE" if self.limit is not None:
                what = str(self.limit)
            case "CONCURRENCY":
                what = "a call to end" + (f", at {self.scope}" if self.scope else "")
            case "WORKER":
                what = "a worker; start one with `sluice worker`"
            case "PAUSED":
                what = "its resumption; it is paused"
            case "COOLDOWN":
                what = "the end of a rest that the provider asked for"
            case "RETRY":
                what = "its next try"
            case _:
                what = "room in a limit"
        return what + (f", until {self.until}" if self.until is not None else "")


class Eta(msgspec.Struct, rename="camel"):
    """When a batch's last item will be begun."""

    at: str
    seconds_left: int
    limit: Limit | None = None

    def __str__(self) -> str:
        by = f", by {self.limit}" if self.limit is not None else ""
        return f"{self.at}, in {duration(self.seconds_left)}{by}"


class PauseReason(msgspec.Struct, rename="camel"):
    """Why a batch was paused other than by people."""

    message: str


class Batch(msgspec.Struct, rename="camel"):
    """A batch, without its items. What it waits for is known of a single one only."""

    batch_id: UUID
    status: Status
    name: str | None
    total_items: int
    pending: int
    running: int
    completed: int
    failed: int
    cancelled: int
    total_prompt_tokens: int
    total_output_tokens: int
    created_at: str
    completed_at: str | None
    priority: int = 0
    weight: float = 1
    expires_at: str | None = None
    total_cost: float | None = None
    currency: str | None = None
    pause_reason: PauseReason | None = None
    waiting_for: Waiting | None = None
    eta: Eta | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing of it is open any more."""
        return self.pending + self.running == 0

    def snapshot(self) -> Snapshot:
        """Its progress."""
        return Snapshot(
            total=self.total_items,
            answered=self.completed,
            failed=self.failed,
            cancelled=self.cancelled,
            in_flight=self.running,
            input_tokens=self.total_prompt_tokens,
            output_tokens=self.total_output_tokens,
            waits_for=None if self.waiting_for is None else str(self.waiting_for),
        )


class Key(msgspec.Struct, rename="camel"):
    """An API key; its value only when it was made or rotated."""

    api_key_id: UUID
    name: str
    masked_key: str
    enabled: bool
    permissions: list[str]
    expires_at: str | None
    last_used_at: str | None
    api_key_value: str | None = None

    @property
    def state(self) -> str:
        """For people: whether it was disabled; its end, if it has one, is the server's to watch."""
        return "enabled" if self.enabled else "disabled"


class Reply(msgspec.Struct, rename="camel"):
    """What the provider said, to the letter."""

    data: msgspec.Raw = msgspec.Raw(b"null")


class Details(msgspec.Struct, rename="camel"):
    """More about a failure."""

    status_code: int | None = None


class Item(msgspec.Struct, rename="camel"):
    """An item and its answer."""

    index: int
    custom_id: str | None
    status: Status
    response: Reply | None
    error_code: str | None
    error_message: str | None
    error_details: Details | None


class _Made(msgspec.Struct, rename="camel"):
    batch_id: UUID | None = None
    connection_id: UUID | None = None


class _Items(msgspec.Struct, rename="camel"):
    data: list[Item]
    next_cursor: str | None


class _Batches(msgspec.Struct, rename="camel"):
    data: list[Batch]
    next_cursor: str | None


class _Retried(msgspec.Struct, rename="camel"):
    retried: int
    batch: Batch


class _Listed(msgspec.Struct, rename="camel"):
    data: list[JsonObject]
    next_cursor: str | None


class _Refusal(msgspec.Struct, rename="camel"):
    error_message: str = ""
    error_code: str = ""


class RefusedError(SluiceError):
    """The server refused; ``code`` is its ``errorCode``."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class Server:
    """A server and the environment that the key opens. Close it, or ``with`` it."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"}
        # No proxies: a server on this machine must not be asked for through one.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=_TIMEOUT, trust_env=False
        )
        self._place: WhoAmI | None = None

    @classmethod
    def of(cls, settings: Settings, url: str | None, key: str | None) -> "Server":
        """The server of the flags; absent, the one that `sluice up` runs on this machine."""
        value = key or read_bootstrap_key(settings)
        if value is None:
            raise UsageError(
                "Which key? Give the server's with --key; that of a `sluice up` on this machine"
                f" would be in {bootstrap_key_file(settings)}."
            )
        if not value.isascii() or not value.isprintable():
            raise UsageError("--key has characters that no API key has.")
        address = url or f"http://{settings.host}:{settings.port}{settings.base_path}"
        if urlsplit(address).scheme not in ("http", "https"):
            raise UsageError(
                f"--server '{address}' is not a URL; write it like http://127.0.0.1:8080"
            )
        return cls(address, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        self._http.close()

    # What can be asked ----------------------------------------------------------------------------

    def ensure_resource(
        self, name: str, *, base_url: str, model: str, key: str | None, capacity: list[object]
    ) -> bool:
        """Make a connection and a resource of this name; False when they are there already."""
        place = self._tenant()
        connection: dict[str, object] = {"name": name, "baseUrl": base_url}
        if key is not None:
            connection["apiKey"] = key
        try:
            made = self._post(f"/v1/ai-connection/{place}", connection, _Made)
            resource: dict[str, object] = {
                "name": name,
                "model": {"model": model, "connectionId": str(made.connection_id)},
                "capacity": capacity,
            }
            self._post(f"/v1/ai-resource/{place}", resource, _Made)
        except RefusedError as error:
            if error.code.endswith("_ALREADY_EXISTS"):
                return False
            raise
        return True

    def create_batch(self, body: Iterator[bytes], *, idempotency_key: str) -> UUID:
        """Send a batch in chunks; the same key and body give the same batch."""
        headers = {"content-type": "application/json", "idempotency-key": idempotency_key}
        path = f"/v1/completion-batch/{self._tenant()}"
        made = self._ask("POST", path, _Made, content=body, headers=headers)
        if made.batch_id is None:
            raise SluiceError(f"The server at {self.url} made no batch; is it Sluice?")
        return made.batch_id

    def batch(self, batch_id: UUID) -> Batch:
        """A batch as it is now."""
        path = f"/v1/completion-batch/{self._tenant()}/{batch_id}"
        return self._ask(
            "GET", path, Batch, params={"includesItems": "false", "includesUsers": "false"}
        )

    def batches(self, *, most: int, **only: str | None) -> list[Batch]:
        """The newest batches of those that fit the filters, which are named as in the API."""
        path = f"/v1/completion-batch/{self._tenant()}"
        wanted = {name: value for name, value in only.items() if value is not None}
        return self._ask("GET", path, _Batches, params={"limit": str(most)} | wanted).data

    def cancel(self, batch_id: UUID, *, running: str = "finish") -> Batch:
        """Cancel a batch; calls in flight are let finish, or cut."""
        path = f"/v1/completion-batch/{self._tenant()}/{batch_id}/cancel"
        return self._post(path, {"running": running}, Batch)

    def retry(self, batch_id: UUID, which: Mapping[str, object]) -> tuple[int, Batch]:
        """Have items of a batch tried again; how many, and the batch."""
        path = f"/v1/completion-batch/{self._tenant()}/{batch_id}/retry"
        told = self._post(path, which, _Retried)
        return told.retried, told.batch

    def download(
        self, batch_id: UUID, params: Mapping[str, str], write: Callable[[bytes], object]
    ) -> str | None:
        """Write a batch's results as they come; where to go on when some are still to come."""
        path = f"/v1/completion-batch/{self._tenant()}/{batch_id}/results"
        try:
            with self._http.stream("GET", path, params=dict(params)) as reply:
                if not reply.is_success:
                    reply.read()
                    raise self._refused(reply)
                for piece in reply.iter_bytes():
                    write(piece)
                return reply.headers.get("x-sluice-next")
        except httpx.TransportError as error:
            raise self._silent(error) from error

    def pause(self, batch_id: UUID) -> Batch:
        """Pause a batch."""
        return self._post(f"/v1/completion-batch/{self._tenant()}/{batch_id}/pause", None, Batch)

    def resume(self, batch_id: UUID) -> Batch:
        """Let a batch go on."""
        return self._post(f"/v1/completion-batch/{self._tenant()}/{batch_id}/resume", None, Batch)

    def erase(self, batch_id: UUID, *, item_id: UUID | None) -> None:
        """Erase the texts of a batch, or of one item of it."""
        place = f"/v1/completion-batch/{self._tenant()}/{batch_id}"
        path = f"{place}/texts" if item_id is None else f"{place}/{item_id}/texts"
        self._ask("DELETE", path, msgspec.Raw)

    def change(self, batch_id: UUID, change: Mapping[str, object]) -> Batch:
        """Change what steers a batch."""
        path = f"/v1/completion-batch/{self._tenant()}/{batch_id}"
        headers = {"content-type": "application/json"}
        return self._ask("PATCH", path, Batch, content=msgspec.json.encode(change), headers=headers)

    # Connections and resources: shown as they come.

    def listed(self, kind: Kind) -> list[JsonObject]:
        """All connections or resources."""
        found: list[JsonObject] = []
        cursor: str | None = None
        while True:
            params = {"cursor": cursor} if cursor is not None else {}
            path = f"/v1/ai-{kind}/{self._tenant()}"
            page = self._ask("GET", path, _Listed, params=params)
            found += page.data
            cursor = page.next_cursor
            if cursor is None:
                return found

    def read(self, kind: Kind, of: UUID) -> JsonObject:
        """A connection or resource."""
        return self._ask("GET", f"/v1/ai-{kind}/{self._tenant()}/{of}", JsonObject)

    def make(self, kind: Kind, body: JsonObject) -> JsonObject:
        """A new connection or resource."""
        return self._post(f"/v1/ai-{kind}/{self._tenant()}", body, JsonObject)

    def try_out(self, kind: Kind, of: UUID, body: JsonObject | None) -> JsonObject:
        """What one real call of a connection or resource finds."""
        return self._post(f"/v1/ai-{kind}/{self._tenant()}/{of}/test", body, JsonObject)

    def remove(self, kind: Kind, of: UUID, *, force: bool) -> None:
        """Delete a connection or resource; with ``force`` what it is in use for is ended."""
        params = {"force": "true" if force else "false"}
        self._ask("DELETE", f"/v1/ai-{kind}/{self._tenant()}/{of}", type(None), params=params)

    def items(self, batch_id: UUID) -> Iterator[Item]:
        """Every item in order."""
        path = f"/v1/completion-batch/{self._tenant()}/{batch_id}/items"
        cursor: str | None = None
        while True:
            params = {"limit": str(_PAGE)} | ({"cursor": cursor} if cursor is not None else {})
            page = self._ask("GET", path, _Items, params=params)
            yield from page.data
            cursor = page.next_cursor
            if cursor is None:
                return

    def watch(self, batch_id: UUID, view: Progress, *, clock: Callable[[], float]) -> Batch:
        """Show a batch's progress until it is finished; a server that restarts is waited for."""
        silent_since: float | None = None
        while True:
            try:
                batch = self.batch(batch_id)
            except _SilentError:
                silent_since = clock() if silent_since is None else silent_since
                if clock() - silent_since > _PATIENCE_S:
                    raise
            else:
                silent_since = None
                view.show(batch.snapshot())
                if batch.is_finished:
                    return batch
            time.sleep(_LOOK_S)  # a poll of the server, no wait for something of ours

    def keys(self) -> list[Key]:
        """Every API key of the environment, newest first."""
        found: list[Key] = []
        while True:
            params = {"cursor": str(found[-1].api_key_id)} if found else {}
            page = self._ask("GET", f"/v1/api-key/{self._tenant()}", list[Key], params=params)
            found += page
            if len(page) < _PAGE:
                return found

    def create_key(self, body: Mapping[str, object]) -> Key:
        """Make an API key."""
        return self._post(f"/v1/api-key/{self._tenant()}", body, Key)

    def rotate_key(self, key_id: UUID, *, overlap_s: int) -> Key:
        """Give an API key a new value."""
        path = f"/v1/api-key/{self._tenant()}/{key_id}/rotate"
        return self._post(path, {"overlapSeconds": overlap_s}, Key)

    def change_key(self, key_id: UUID, change: Mapping[str, object]) -> Key:
        """Change an API key."""
        path = f"/v1/api-key/{self._tenant()}/{key_id}"
        headers = {"content-type": "application/json"}
        return self._ask("PATCH", path, Key, content=msgspec.json.encode(change), headers=headers)

    def delete_key(self, key_id: UUID) -> None:
        """Delete an API key."""
        self._ask("DELETE", f"/v1/api-key/{self._tenant()}/{key_id}", type(None))

    # How it is asked ------------------------------------------------------------------------------

    def _tenant(self) -> str:
        if self._place is None:
            self._place = self._ask("GET", "/v1/whoami", WhoAmI)
        return f"{self._place.workspace_id}/{self._place.environment_id}"

    def _post(self, path: str, body: object, into: type[Decoded]) -> Decoded:
        content = b"" if body is None else msgspec.json.encode(body)
        headers = {"content-type": "application/json"}
        return self._ask("POST", path, into, content=content, headers=headers)

    def _ask(
        self,
        method: str,
        path: str,
        into: type[Decoded],
        *,
        content: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Decoded:
        try:
            reply = self._http.request(
                method, path, content=content, headers=headers, params=params
            )
        except httpx.TransportError as error:
            raise self._silent(error) from error
        except httpx.InvalidURL:
            raise UsageError(f"--server '{self.url}' is not a URL.") from None
        if not reply.is_success:
            raise self._refused(reply)
        try:
            return msgspec.json.decode(reply.content or b"null", type=into)
        except msgspec.DecodeError:
            raise SluiceError(f"What answers at {self.url} is not Sluice.") from None

    def _silent(self, error: httpx.TransportError) -> SluiceError:
        reason = str(error) or type(error).__name__
        return _SilentError(
            f"The server at {self.url} does not answer ({reason}). Start it with `sluice up`,"
            " or name another with --server."
        )

    def _refused(self, reply: httpx.Response) -> SluiceError:
        if reply.status_code == _UNAUTHENTICATED:
            return SluiceError(f"The server at {self.url} does not know this key; see --key.")
        try:
            told = msgspec.json.decode(reply.content, type=_Refusal)
        except msgspec.DecodeError:
            told = _Refusal()
        said = told.error_message or f"HTTP status {reply.status_code}"
        return RefusedError(f"The server at {self.url} refused: {said}", code=told.error_code)


class _SilentError(SluiceError):
    """The server cannot be reached, which may pass."""
