"""Bounds of a step's time by hand-computed numbers."""
import pytest

from vora_jax.planning.roofline import Demand, bound, links, rough_hbm_bytes
from vora_jax.training.flops.chips import CHIPS, GIB, chip_of, chip_of_topology
from vora_jax.types import UserError

V5E, V5P, V6E, H100 = (chip_of_topology(name) for name in ('v5e:8x8', 'v5p:4x4x4', 'v6e:16x16', 'h100:8'))


def test_the_busiest_resource_sets_the_time():
    chip = V5E._replace(flops=1e15, hbm=1e12, link=1e10, dcn=8e9, host_devices=8)
    demand = Demand(model=1.5e15, executed=2e15, tokens=4000)
    found = bound(chip, (2, 2), 4, demand)
    assert found.seconds == {'compute': 0.5, 'memory': 0, 'interconnect': 0, 'network': 0}
    assert (found.binding, found.step_seconds, found.tokens_per_second_per_device) == ('compute', 0.5, 2000)
    assert found.ceiling == found.mfu == 0.75
    # 4 of 4 devices use two open axes: 1e10 bytes over 2 links take half a second, and 2 of them over one link the rest.
    found = bound(chip, (2, 2), 4, demand._replace(hbm_bytes=6e11, wire_bytes={4: 1e10, 2: 5e9}, network_bytes=5e8))
    assert found.seconds == pytest.approx({'compute': 0.5, 'memory': 0.6, 'interconnect': 1.0, 'network': 0.5})
    assert found.binding == 'interconnect' and found.serial_seconds == pytest.approx(2.6)
    assert found.tokens_per_second_per_device == pytest.approx(1000) and found.mfu == pytest.approx(0.375)


@pytest.mark.parametrize('chip, shape, group, number', [
    (V5E, (8, 8), 64, 2), (V5E, (8, 8), 8, 1), (V5E, (8, 8), 4, 1), (V5E, (16, 16), 256, 4), (V6E, (16, 16), 16, 2),
    (V5P, (4, 4, 4), 64, 6), (V5P, (4, 4, 4), 16, 4), (V5P, (4, 4, 4), 4, 2), (V5P, (2, 2, 1), 4, 2), (H100, (8,), 8, 18),
    (chip_of('TPU7x'), (4, 4, 4), 128, 3), (V5E, (1, 1), 1, 1)])
def test_links_of_a_group(chip, shape, group, number):
    assert links(chip, shape, group) == number


def test_the_sketch_of_7b_on_v5e():
    """specs/pods.md: 46.98 PF take 3.73 s, 44.5 GB of two hops about 0.9 s: compute binds, and 0.737 is the ceiling."""
    found = bound(V5E, (8, 8), 64, Demand(34.62e15, 46.98e15, 256 * 3072, rough_hbm_bytes(17.5e9, 3, 0, 150e9), {8: 42.7e9}))
    assert found.binding == 'compute' and found.step_seconds == pytest.approx(3.73, abs=0.01)
    assert found.seconds['interconnect'] == pytest.approx(0.95, abs=0.01) and 0.4 < found.seconds['memory'] < 0.6
    assert found.ceiling == found.mfu == pytest.approx(0.737, abs=5e-4)


def test_chips_by_kind_and_topology():
    assert chip_of('TPU v5 lite').name == 'v5e' and chip_of('TPU v5').name == chip_of('TPU v5p').name == 'v5p'
    assert chip_of('TPU v6 lite').name == 'v6e' and chip_of('NVIDIA H100 80GB HBM3').name == 'h100'
    assert chip_of('cpu') is None
    assert len({kind for chip in CHIPS for kind in chip.kinds}) == sum(len(chip.kinds) for chip in CHIPS)
    assert (V5E.usable_bytes, V5P.usable_bytes, V6E.usable_bytes) == (15.75 * GIB, 95.74 * GIB, 31.25 * GIB)
    # The data sheets' bandwidth of all links of a chip, both ways, is at most what the table multiplies to.
    for name, both_ways in {'v5e': 400e9, 'v5p': 1200e9, 'v6e': 800e9, 'tpu7x': 600e9, 'h100': 900e9, 'a100': 600e9}.items():
        chip = next(chip for chip in CHIPS if chip.name == name)
        assert 0.9 * both_ways <= 2 * chip.links * chip.link <= both_ways


@pytest.mark.parametrize('topology, told', [
    ('v3:8x8', "there is no chip 'v3'"), ('v5e', "'' is not a shape of v5e; write it like v5e:4x4"),
    ('v5p:8x8', "'8x8' is not a shape of v5p; write it like v5p:4x4x4"), ('h100:0', "'0' is not a shape of h100"),
    ('h100:2x4', 'write it like h100:8')])
def test_topologies_that_do_not_exist_are_told(topology, told):
    with pytest.raises(UserError, match=told):
        chip_of_topology(topology)
