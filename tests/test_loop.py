from conftest import losses


def test_loss_falls_and_adapter_is_written(run_recipe):
    run, report = run_recipe()
    assert losses(run)[-1] < losses(run)[0]
    assert report["learned"]
    assert (run / "adapter" / "adapter_model.safetensors").exists()
