"""The requests to which the rate of a key applies."""

from pathlib import Path

from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys

PIXELS = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}]}


def test_the_rate_limits_predictions_and_the_key_protects_every_route(
    bundle, serving, make_image, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("some-key-1\n")
    headers = {"X-API-Key": "some-key-1"}
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys", rate=0.01))) as client:
        infer = "/v2/models/shapes/infer"
        for path in ("/v1/model", "/v1/status", "/v2/models/shapes", "/v2/models/shapes/ready"):
            assert client.get(path).status_code == 401
            assert [client.get(path, headers=headers).status_code for _ in range(3)] == [200] * 3
        assert client.post("/admin/rollback", headers=headers).status_code == 409
        assert client.post(infer, json=PIXELS).status_code == 401
        answered = client.post(infer, json=PIXELS, headers=headers)
        assert (answered.status_code, answered.headers["x-model-digest"]) == (200, bundle.digest[:16])
        for refused in (
            client.post(infer, json=PIXELS, headers=headers),
            client.post(f"/v2/models/shapes/versions/{bundle.digest[:16]}/infer", json=PIXELS, headers=headers),
            client.post("/v1/predict", content=make_image(1), headers=headers),
        ):
            assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert client.get("/v1/status", headers=headers).status_code == 200
