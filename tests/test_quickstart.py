import pytest

from timm_collapse.quickstart import quickstart


@pytest.mark.slow
def test_quickstart_trains_measures_and_draws(tmp_path, capsys):
    """Real training in miniature: the learned order must beat random, and its reverse must lose."""
    areas = quickstart(tmp_path, steps=100)
    assert areas["random"] == 0
    assert areas["collapse (ranker)"] < -0.1 and areas["reversed (ranker)"] > 0.1
    assert areas["collapse (ranker)"] < areas["bayer (spread)"]
    for file in (
        "order.png",
        "uncertainty.png",
        "comae.png",
        "dependency.png",
        "classes.png",
        "ranker/model.safetensors",
        "comae/config.json",
    ):
        assert (tmp_path / file).stat().st_size > 0
    assert "masks polarise" in capsys.readouterr().out
