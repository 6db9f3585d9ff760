"""The clients of the reference's documentation page."""

# To the letter, as they stand there.
SYNC_EXAMPLE = """
import requests
import json

workspace_id = "6c41dc1b-910c-4358-beef-2c609d38db31"
environment_id = "6c1957ca-77ca-49b3-8fa1-0590281b8b44"

# Create batch with SYNC type
response = requests.post(
    f"http://localhost:3000/v1/completion-batch/{workspace_id}/{environment_id}",
    headers={
        "Authorization": "Bearer your-vmx-api-key",
        "Content-Type": "application/json",
    },
    json={
        "type": "SYNC",
        "items": [
            {
                "resourceId": "your-resource-id",
                "request": {
                    "messages": [
                        {"role": "user", "content": "Summarize this document: ..."}
                    ]
                }
            },
            {
                "resourceId": "your-resource-id",
                "request": {
                    "messages": [
                        {"role": "user", "content": "Extract key points from: ..."}
                    ]
                }
            }
        ]
    },
    stream=True # Enable streaming for SSE
)

# Process SSE events
for line in response.iter_lines():
    if line:
        data = line.decode('utf-8')
        if data.startswith('data: '):
            event_data = json.loads(data[6:])
            if event_data.get('action') == 'item-completed':
                print(f"Item completed: {event_data['payload']['itemId']}")
            elif event_data.get('action') == 'batch-completed':
                print("Batch completed!")
                break
"""

ASYNC_EXAMPLE = """
import requests
import time

workspace_id = "6c41dc1b-910c-4358-beef-2c609d38db31"
environment_id = "6c1957ca-77ca-49b3-8fa1-0590281b8b44"

# Create batch
response = requests.post(
    f"http://localhost:3000/v1/completion-batch/{workspace_id}/{environment_id}",
    headers={
        "Authorization": "Bearer your-vmx-api-key",
        "Content-Type": "application/json",
    },
    json={
        "type": "ASYNC",
        "items": [
            {
                "resourceId": "your-resource-id",
                "request": {
                    "messages": [
                        {"role": "user", "content": "Process document..."}
                    ]
                }
            }
        ]
    }
)

batch = response.json()
batch_id = batch["batchId"]

# Poll for status
while True:
    status_response = requests.get(
        f"http://localhost:3000/v1/completion-batch/{workspace_id}/{environment_id}/{batch_id}",
        headers={"Authorization": "Bearer your-vmx-api-key"}
    )
    batch_status = status_response.json()

    print(f"Progress: {batch_status['completedPercentage']}%")

    if batch_status["status"] in ["COMPLETED", "FAILED"]:
        break

    time.sleep(5) # Poll every 5 seconds
"""

CALLBACK_EXAMPLE = """
import requests

workspace_id = "6c41dc1b-910c-4358-beef-2c609d38db31"
environment_id = "6c1957ca-77ca-49b3-8fa1-0590281b8b44"

# Create batch with callback
response = requests.post(
    f"http://localhost:3000/v1/completion-batch/{workspace_id}/{environment_id}",
    headers={
        "Authorization": "Bearer your-vmx-api-key",
        "Content-Type": "application/json",
    },
    json={
        "type": "CALLBACK",
        "callbackOptions": {
            "url": "https://your-app.com/batch-callback",
            "headers": {
                "X-API-Key": "your-secret-key"
            },
            "events": ["item_update", "batch_update"]
        },
        "items": [
            {
                "resourceId": "your-resource-id",
                "request": {
                    "messages": [
                        {"role": "user", "content": "Process document..."}
                    ]
                }
            }
        ]
    }
)

batch = response.json()
print(f"Batch created: {batch['batchId']}")
"""


def directed(
    example: str, *, url: str, workspace_id: str, environment_id: str, key: str, resource_id: str
) -> str:
    """An example at another host, with other ids. Its sleep is short: tests do not wait."""
    for there, here in (
        ("http://localhost:3000", url),
        ("6c41dc1b-910c-4358-beef-2c609d38db31", workspace_id),
        ("6c1957ca-77ca-49b3-8fa1-0590281b8b44", environment_id),
        ("your-vmx-api-key", key),
        ("your-resource-id", resource_id),
    ):
        example = example.replace(there, here)
    return (
        "import time; sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 100)\n"
        + example
    )
