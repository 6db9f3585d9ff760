"""The HTTP API. The only package that knows Litestar.

application   the app and the server around it
batches       /v1/completion-batch: create, read, list, steer, cancel, follow
connections   /v1/ai-connection, /v1/ai-provider
resources     /v1/ai-resource
keys          /v1/api-key, /v1/whoami
workspaces    /v1/workspace, /v1/environment, /v1/user, /v1/role
deliveries    /v1/completion-batch/…/deliveries: what was told, and telling it again
webhook_endpoints   /v1/webhook_endpoints, /v1/webhook_event_types
health        /healthz, /healthcheck, /readyz
ingest        a request body of any size becomes a batch; splitter takes its JSON apart
streams       the hub behind server-sent events
auth          who is calling, and whether they may: the one place that decides
owned         what connections, resources and keys have in common
wire          the JSON of requests and answers; wire_access, wire_batches, wire_capacity,
              wire_connections, wire_resources, wire_webhooks: of each noun. They know nothing of
              Litestar: the sender makes its messages with them
described     bodies that are read by hand, for OpenAPI
errors        the JSON of refusals

The package itself imports nothing, so that whoever needs the wire's words loads no web framework.
"""
