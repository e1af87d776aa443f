import pytest

from timm_collapse.quickstart import miniature, photos, quickstart


@pytest.mark.slow
def test_quickstart_measures_trains_and_draws(tmp_path, capsys, monkeypatch):
    """The bundled orders must beat a spread on photos, a trained one random order, and the reverse must lose."""
    for module, crops in ((photos, 2), (miniature, 8)):
        monkeypatch.setattr(module, "CROPS", crops)
    areas = quickstart(tmp_path, steps=40)
    collapsed = [area for name, area in areas.items() if name.startswith("collapse ")]
    assert areas["random"] == 0 and len(collapsed) == 2 and areas["reversed (tiny)"] > 0.1
    assert max(collapsed) < -0.15 and max(collapsed) < areas["bayer (spread)"] - 0.05
    assert areas["miniature: ranker"] < 0 < areas["miniature: ranker, reversed"]
    assert areas["miniature: CoMAE"] < areas["miniature: bayer (spread)"] < areas["miniature: CoMAE, as published"]
    for file in (
        "order_china.png",
        "order_flower.png",
        "uncertainty.png",
        "uncertainty_miniature.png",
        "comae.png",
        "dependency_comae.png",
        "dependency_ranker.png",
        "ranker/model.safetensors",
        "comae/config.json",
    ):
        assert (tmp_path / file).stat().st_size > 0
    out = capsys.readouterr().out
    assert "masks polarise" in out and "times as many" in out and "Next" in out
