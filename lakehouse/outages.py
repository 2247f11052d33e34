"""What the Iceberg catalog, the object store or the network says when it fails, as Retryable or Terminal.

Their clients raise some forty classes of exception of six libraries. What an orchestrator must know is one thing: does asking
again help, or must a person act (rights, keys, a wrong address).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
from pyiceberg.exceptions import (
    AuthorizationExpiredError,
    CommitFailedException,
    ForbiddenError,
    OAuthError,
    RESTError,
    UnauthorizedError,
)
from requests import RequestException
from sqlalchemy.exc import DBAPIError, OperationalError

from lakehouse.errors import LakehouseError, Retryable, Terminal

# what Arrow's S3 client calls answers that stay the same (its own retries take care of the others first)
STORE_REFUSES = re.compile(
    r"AWS Error (ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|NO_SUCH_BUCKET|"
    r"MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT)"
)
ASK_AGAIN = {408, 409, 425, 429}  # of the 4xx: too slow, too early, too often, or another came first
GLUE_BUSY = {"ThrottlingException", "Throttling", "TooManyRequestsException", "OperationTimeoutException"}
AWS_NOT_SET_UP = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "NoRegionError",
    "ProfileNotFound",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "SSOError",
    "UnauthorizedSSOTokenError",
    "InvalidConfigError",
}


def without_password(text: str) -> str:
    """Text with the password of each URL in it as stars."""
    return re.sub(r"(//[^/@:\s]*):[^/@\s]*@", r"\1:***@", text)


def is_outage(error: BaseException) -> bool:
    """Whether it comes from the world around us, and is no defect of our own."""
    if isinstance(error, duckdb.IOException):  # it says this of a local file that does not exist, too
        return "HTTP" in str(error)
    return isinstance(error, RESTError | RequestException | DBAPIError | OSError) or _is_aws(error)


def is_refusal(error: BaseException | None) -> bool:
    """Whether asking again would be answered in the same way: a person must act."""
    if isinstance(error, RESTError):
        # not BadRequestError: so SeaweedFS answers a commit whose sequence number a commit to a branch has taken meanwhile
        return isinstance(error, UnauthorizedError | ForbiddenError | AuthorizationExpiredError | OAuthError)
    if isinstance(error, DBAPIError):
        return not isinstance(error, OperationalError)
    if error is not None and _is_aws(error):
        answer = getattr(error, "response", None)
        if answer is None:
            return type(error).__name__ in AWS_NOT_SET_UP
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return 400 <= status < 500 and answer.get("Error", {}).get("Code") not in GLUE_BUSY
    if isinstance(error, OSError) and not isinstance(error, RequestException):
        return isinstance(error, PermissionError | FileNotFoundError) or STORE_REFUSES.search(str(error)) is not None
    return isinstance(error, duckdb.IOException) and re.search(r"HTTP (40[0-9]|code 40[0-9])|Forbidden", str(error)) is not None


def is_lasting(error: BaseException) -> bool:
    """Whether the request itself is at fault, or our code: on the same state of the table the answer will be the same.

    Not what cannot be read (a ValueError): an answer that was cut short.
    """
    if isinstance(error, RESTError):
        status = getattr(getattr(error.__cause__, "response", None), "status_code", 0)
        return 400 <= status < 500 and status not in ASK_AGAIN
    return not (is_outage(error) or isinstance(error, CommitFailedException | ValueError))


def explain(error: BaseException, what: str, *, lasting: bool = False) -> LakehouseError:
    """The failure of `what` (such as "raw.records: writing data files"), with what it says and what to do.

    lasting: it was said again on the same state of things.
    """
    said = str(error.orig) if isinstance(error, DBAPIError) and error.orig else str(error)  # its own text quotes parameters
    said = without_password(said.strip().split("\n")[0])
    if is_refusal(error):
        return Terminal(f"{what} was refused: {said}. Look at addresses, keys and rights: lakehouse settings")
    if lasting:
        return Terminal(f"{what} was refused: {said}. Asked again, the answer was the same: it is the request that is wrong")
    # a change of schema or a rollback whose answer was lost may have landed: then running it again finds it done
    return Retryable(f"{what} failed: {said}. Nothing is done twice; run it again")


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Raise what goes wrong with the catalog or the store inside the context as Retryable or Terminal."""
    try:
        yield
    except LakehouseError:
        raise
    except Exception as error:
        if not is_outage(error):
            raise
        raise explain(error, what) from error


def _is_aws(error: BaseException) -> bool:
    return type(error).__module__.startswith("botocore.")
