"""failed

Generated; the revision is the .sql file beside it.
"""

from pathlib import Path

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    # Bytes without parameters: nothing reads ":name" or "%" as a placeholder.
    connection.execute(Path(__file__).with_suffix(".sql").read_bytes())


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only: write a revision that puts it right.")
