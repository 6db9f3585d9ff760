"""Creating batches: the documented clients, what is refused and how, and that nothing is half done."""

import asyncio
import json
from typing import Any, cast

import pytest
import requests

from app.batches import Ingest
from app.settings import Settings
from tests.api.conftest import Service
