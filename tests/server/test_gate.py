"""With a key, every route but the probes is closed, whatever else is wrong with a request."""

import openai
import pytest
from starlette.routing import Route

from paged.config import EngineConfig
from server.app import build_app
from server.args import ServerArgs
from server.gate import OPEN_PATHS
from server.service import Service
from tests.server.test_refusals import check_error

KEYS = ["--api-key", "first", "second"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tiny_model):
    from tests.server.conftest import FOUR, TINY_FLAGS, launch, wait_until_ready

    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text("third\n\n fourth \n")
    flags = [*TINY_FLAGS, *FOUR, *KEYS, "--api-key-file", str(folder / "keys"), "--served-model-name", "tiny"]
    server = wait_until_ready(launch(folder / "log", "--model", tiny_model, *flags))
    yield server
    assert server.stop() == 0


def all_paths() -> list[str]:
    routes = build_app(Service(ServerArgs(), EngineConfig())).routes
    return [route.path.replace("{id:path}", "tiny") for route in routes if isinstance(route, Route)]


@pytest.mark.parametrize("path", [*all_paths(), "/", "/no/such/route"])
def test_routes_are_closed(guarded, path):
    for send in (lambda: guarded.get(path), lambda: guarded.post(path, {"bad": "body"})):
        if path in OPEN_PATHS:
            assert send().status_code in (200, 405)
        else:
            error = check_error(send(), 401, None, "invalid_api_key")
            assert error["type"] == "authentication_error"
            assert send().headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", ["wrong", "Bearer", "Bearer wrong", "Bearer firs", "Basic first", "Bearer first second"]
)
def test_wrong_keys(guarded, header):
    response = guarded.get("/v1/models", headers={"Authorization": header})
    check_error(response, 401, None, "invalid_api_key")


@pytest.mark.parametrize("key", ["first", "second", "third", "fourth"])
def test_right_keys(guarded, key):
    client = guarded.client(api_key=key)
    assert client.models.list().data[0].id == "tiny"
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def test_wrong_key_through_the_client(guarded):
    with pytest.raises(openai.AuthenticationError):
        guarded.client(api_key="wrong").models.list()
