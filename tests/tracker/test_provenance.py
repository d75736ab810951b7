from detr_exp.tracker.provenance import environment, parameters

CONFIG = {
    "seed": 0,
    "model": {"image_size": [160, 160], "backbone": {"depth": 18}},
    "optim": {"lr": 1e-4, "lr_backbone": None},
    "loss": {"focal_gamma": 2.0, "hidden": 1},
}


def test_parameters_are_curated_and_swept_values():
    overrides = [
        "loss.focal_gamma=2.0",
        "model=rtdetrv2",
        "+model.backbone.depth=18",
        "~loss.hidden",
        "optim={lr_backbone:null}",
    ]
    assert parameters(CONFIG, overrides, {"model": "rtdetrv2", "optim/scheduler": "cosine"}) == {
        "model": "rtdetrv2",
        "optim/scheduler": "cosine",
        "seed": "0",
        "model.image_size": "[160, 160]",
        "optim.lr": "0.0001",
        "loss.focal_gamma": "2.0",
        "model.backbone.depth": "18",
        "optim": "{'lr': 0.0001, 'lr_backbone': None}",
    }


def test_environment_names_packages_and_commit():
    tags = environment()
    assert tags["version/torch"].startswith("2.")
    assert len(tags.get("git.commit", "0" * 40)) == 40
    assert tags.get("git.dirty", "true") in ("true", "false")
