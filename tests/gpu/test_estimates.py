"""On a CUDA device: estimates against those of the CPU (``pytest -m gpu``)."""

import pytest
import torch
from small_backbone import small_denoiser

import hessdiag
from ocm.training.small_unet import small_unet

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_estimates_are_those_of_the_cpu(mode):
    results = []
    for device in ("cpu", "cuda"):
        denoiser = small_denoiser(device)
        x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        results.append(hessdiag.hutchinson(denoiser.output_at(10), x, 4, mode=mode).cpu())
    assert (results[1] - results[0]).norm() < 1e-3 * results[0].norm()


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_estimates_of_a_unet_of_diffusers_are_those_of_the_cpu(mode):
    pytest.importorskip("diffusers", reason="compares a U-Net of diffusers on both devices")
    unet, x = small_unet((2, 8, 8)), torch.randn(2, 2, 8, 8)
    expected = hessdiag.hutchinson(lambda x: unet(x, 9).sample, x, 4, mode=mode)
    unet.cuda()
    on_gpu = hessdiag.hutchinson(lambda x: unet(x, 9).sample, x.cuda(), 4, mode=mode)
    assert (on_gpu.cpu() - expected).norm() < 1e-3 * expected.norm()


class TestEstimate:
    def network(self):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU()]
        module = torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 3, 3, padding=1)).double()
        return module, torch.randn(4, 3, 8, 8, dtype=torch.float64)

    @pytest.mark.parametrize("probes", ["rademacher", "normal", "coloring", "orthogonal", "auto"])
    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_it_is_that_of_the_cpu(self, probes, mode):
        module, x = self.network()
        arguments = {"probes": probes, "max_probes": 50, "mode": mode, "seed": 3}
        expected = hessdiag.estimate(module, x, **arguments)
        on_gpu = hessdiag.estimate(module.cuda(), x.cuda(), **arguments)
        torch.testing.assert_close(on_gpu.diagonal.cpu(), expected.diagonal, rtol=1e-4, atol=1e-5)
        assert torch.equal(on_gpu.num_probes.cpu(), expected.num_probes)
        assert torch.equal(on_gpu.num_blocks.cpu(), expected.num_blocks)

    def test_a_convolutional_network_is_batched_by_vmap(self):
        module, x = self.network()
        result = hessdiag.estimate(module.cuda(), x.cuda(), max_probes=4)
        assert (result.mode, result.batching) == ("vjp", "vmap")

    def test_a_tolerance(self):
        module, x = self.network()
        expected = hessdiag.estimate(module, x, max_probes=2000, rtol=0.1)
        on_gpu = hessdiag.estimate(module.cuda(), x.cuda(), max_probes=2000, rtol=0.1)
        assert torch.equal(on_gpu.num_probes.cpu(), expected.num_probes)

    def test_memory_that_runs_out_shrinks_the_chunk(self):
        x = torch.randn(8, 64, 128, 128, device="cuda")  # 32 MiB
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(2**30 / total)
        try:
            result = hessdiag.estimate(
                lambda x: x.sin().cos().exp(), x, max_probes=64, chunk_size=64
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert "out of memory" in result.note
        expected = (x.sin().cos().exp() * -x.sin().sin() * x.cos()).float()
        torch.testing.assert_close(result.diagonal, expected, rtol=1e-4, atol=1e-5)
