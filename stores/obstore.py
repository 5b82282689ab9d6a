"""The library that speaks to object stores: there or not, and what it means by its errors."""

from __future__ import annotations

from typing import Any


def obstore_module() -> Any:
    """The library; ValueError where it is not installed."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise ValueError(
            "a store with a URL needs obstore, which is not installed: "
            "pip install 'routesae-cache[cloud]'"
        ) from None
    return obstore


_HINTS = {
    "NoSuchBucket": "there is no such bucket",
    "ContainerNotFound": "there is no such container",
    "The specified bucket does not exist": "there is no such bucket",
    "InvalidAccessKeyId": "the access key is not known there; see AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; see AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "access is denied; see the credentials and what they may do",
    "403 Forbidden": "access is denied; see the credentials and what they may do",
    "401 Unauthorized": "access is denied; see the credentials and what they may do",
    "169.254.169.254": (
        "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
        "(this is no machine of the provider's with credentials of its own)"
    ),
    "metadata.google.internal": "no credentials: set GOOGLE_APPLICATION_CREDENTIALS",
    "Account must be specified": "no account: set AZURE_STORAGE_ACCOUNT_NAME",
    "error sending request": "it cannot be reached; see --endpoint-url and the network",
}
"""What is to be found in obstore's messages, and what it means; the first that fits."""


def reason(error: Exception) -> str:
    """One line: what obstore says goes on for pages, and has the request in it."""
    text = str(error)
    for sign, meaning in sorted(_HINTS.items(), key=lambda hint: "169.254" not in hint[0]):
        if sign in text:
            return meaning
    return text.strip().splitlines()[0]
