"""The HTTP API. The only package that knows Litestar.

application   the app and the server around it
batches       /v1/completion-batch: create, read, list, steer, cancel, follow
tenants       /v1/ai-connection, /v1/ai-resource
keys          /v1/api-key, /v1/whoami
workspaces    /v1/workspace, /v1/environment, /v1/user, /v1/role
health        /healthz, /healthcheck, /readyz
ingest        a request body of any size becomes a batch; splitter takes its JSON apart
streams       the hub behind server-sent events
auth          who is calling, and whether they may: the one place that decides
limited       what connections, resources and keys have in common
wire          the JSON of requests and answers; wire_access, wire_batches, wire_capacity, wire_tenants: of each noun
described     bodies that are read by hand, for OpenAPI
errors        the JSON of refusals
"""

from app.api.application import create_app, serve

__all__ = ["create_app", "serve"]
