"""Secrets at rest, api keys and the key file."""

import base64
import hashlib
import os
import string
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import SecretError
from app.secrets import (
    Keyring,
    Sealed,
    hash_api_key,
    load_or_create_key_file,
    mask,
    mint_api_key,
)

OLD = base64.urlsafe_b64encode(b"o" * 32).decode()
NEW = base64.urlsafe_b64encode(b"n" * 32).decode()
CONTEXT = "connection 1"


def message(refused: pytest.ExceptionInfo[SecretError]) -> str:
    """What a person is told; it never holds a key."""
    text = str(refused.value)
    for key in (OLD, NEW):
        assert key.rstrip("=") not in text
    return text


# --- sealing --------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=())), st.text())
def test_what_was_sealed_opens_again(plaintext: str, context: str) -> None:
    keyring = Keyring(OLD)
    assert keyring.open(keyring.seal(plaintext, context=context), context=context) == plaintext


def test_the_same_secret_is_sealed_differently_each_time() -> None:
    keyring = Keyring(OLD)
    first = keyring.seal("s3cret", context=CONTEXT)
    second = keyring.seal("s3cret", context=CONTEXT)
    assert first.ciphertext != second.ciphertext
    assert b"s3cret" not in first.ciphertext


def test_another_context_does_not_open_it() -> None:
    keyring = Keyring(OLD)
    sealed = keyring.seal("s3cret", context=CONTEXT)
    with pytest.raises(SecretError, match="another purpose") as refused:
        _ = keyring.open(sealed, context="connection 2")
    assert keyring.key_id in message(refused)


def test_altered_or_cut_bytes_do_not_open() -> None:
    keyring = Keyring(OLD)
    sealed = keyring.seal("s3cret", context=CONTEXT)
    whole = sealed.ciphertext
    altered = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for wrong in [*altered, *(whole[:length] for length in range(len(whole))), whole + b"\0"]:
        with pytest.raises(SecretError):
            _ = keyring.open(Sealed(key_id=sealed.key_id, ciphertext=wrong), context=CONTEXT)


def test_an_unknown_key_is_named() -> None:
    sealed = Keyring(f"old:{OLD}").seal("s3cret", context=CONTEXT)
    with pytest.raises(SecretError, match=r"the key 'old'.*it holds: new") as refused:
        _ = Keyring(f"new:{NEW}").open(sealed, context=CONTEXT)
    assert "s3cret" not in message(refused)


def test_another_key_of_the_same_id_does_not_open_it() -> None:
    sealed = Keyring(f"k:{OLD}").seal("s3cret", context=CONTEXT)
    with pytest.raises(SecretError, match="the key 'k'"):
        _ = Keyring(f"k:{NEW}").open(sealed, context=CONTEXT)


def test_the_first_key_seals_and_every_key_opens() -> None:
    before = Keyring(OLD)
    sealed = before.seal("s3cret", context=CONTEXT)
    after = Keyring(f"2026:{NEW}, {before.key_id}:{OLD}")
    assert after.open(sealed, context=CONTEXT) == "s3cret"
    assert after.seal("s3cret", context=CONTEXT).key_id == "2026"
    assert Keyring(f"{NEW},{OLD}").open(sealed, context=CONTEXT) == "s3cret"


def test_a_bare_key_is_named_after_its_hash() -> None:
    assert Keyring(OLD).key_id == hashlib.sha256(b"o" * 32).hexdigest()[:8]
    assert Keyring(OLD.rstrip("=")).key_id == Keyring(OLD).key_id


@pytest.mark.parametrize(
    "setting",
    [
        *("", ",", "k:", ":", f"{OLD},", f":{OLD}", f"a b:{OLD}", f"k:{OLD}x", f"k:{OLD[:-6]}"),
        *("key", OLD[:40], f"{OLD[:10]} {OLD[10:]}", f"ä:{OLD}", "!" * 43, "A" * 41),
    ],
)
def test_a_setting_that_holds_no_key_is_refused_without_showing_it(setting: str) -> None:
    with pytest.raises(SecretError, match="SLUICE_SECRET_KEY") as refused:
        _ = Keyring(setting)
    _ = message(refused)


def test_two_keys_of_one_id_are_refused() -> None:
    with pytest.raises(SecretError, match="the key 'k' twice"):
        _ = Keyring(f"k:{OLD},k:{NEW}")


def test_generated_keys_are_accepted_and_differ() -> None:
    first, second = Keyring.generate(), Keyring.generate()
    assert Keyring(first).key_id != Keyring(second).key_id


def test_no_repr_shows_a_key() -> None:
    keyring = Keyring(f"new:{NEW},old:{OLD}")
    assert repr(keyring) == str(keyring) == "Keyring(new, old)"
    minted = mint_api_key()
    assert minted.value not in repr(minted)
    assert minted.masked in repr(minted)


# --- api keys -------------------------------------------------------------------------------


def test_api_keys_are_random_and_found_by_their_hash() -> None:
    minted = mint_api_key()
    assert minted.value.startswith("slk_")
    assert len(minted.value) == 4 + 43
    assert set(minted.value[4:]) <= set(string.ascii_letters + string.digits + "-_")
    assert (
        minted.hash == hash_api_key(minted.value) == hashlib.sha256(minted.value.encode()).digest()
    )
    assert mint_api_key().value != minted.value


def test_any_text_can_be_looked_up_as_an_api_key() -> None:
    assert len(hash_api_key("\ud800ä")) == 32


def test_a_mask_shows_both_ends_of_a_key_and_nothing_of_a_short_one() -> None:
    value = "slk_" + "abcd" * 10 + "xyz"
    assert mask(value) == "slk_abcd…dxyz"
    assert mask("sk-short") == mask("") == "…"


# --- the key file ---------------------------------------------------------------------------


def names(directory: Path) -> list[str]:
    return [file.name for file in directory.iterdir()]


def test_a_key_file_is_created_once_and_private(tmp_path: Path) -> None:
    file = tmp_path / "home" / "secret.key"
    setting = load_or_create_key_file(file)
    assert Keyring(setting)
    assert load_or_create_key_file(str(file)) == setting
    assert file.stat().st_mode & 0o777 == 0o600
    assert names(file.parent) == ["secret.key"]


def test_processes_that_start_at_once_end_with_the_same_key(tmp_path: Path) -> None:
    file = tmp_path / "secret.key"
    with ProcessPoolExecutor(4, mp_context=get_context("forkserver")) as pool:
        settings = set(pool.map(load_or_create_key_file, [file] * 16))
    assert len(settings) == 1
    assert names(tmp_path) == ["secret.key"]


def test_who_comes_second_returns_the_key_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret.key"
    link = os.link

    def overtaken(draft: Path, target: Path) -> None:
        other = tmp_path / "other"
        _ = other.write_text(OLD)
        other.chmod(0o600)
        link(other, target)
        other.unlink()
        link(draft, target)

    monkeypatch.setattr(os, "link", overtaken)
    assert load_or_create_key_file(file) == OLD
    assert names(tmp_path) == ["secret.key"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_key_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret.key"
    _ = file.write_text(OLD)
    file.chmod(mode)
    with pytest.raises(SecretError, match=r"chmod 600 .*secret\.key") as refused:
        _ = load_or_create_key_file(file)
    _ = message(refused)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", OLD[:30].encode()])
def test_a_key_file_without_a_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "secret.key"
    _ = file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(SecretError, match="restore it from a backup"):
        _ = load_or_create_key_file(file)
    assert file.read_bytes() == content


def test_a_key_file_that_cannot_be_opened_is_an_error_for_a_person(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="cannot be used"):
        _ = load_or_create_key_file(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SecretError, match="cannot be used"):
        _ = load_or_create_key_file(tmp_path / "file" / "secret.key")
