"""The losses of a train step by hand, and that they are pure tensor code."""

from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan import training
from fastgan.data import edge_map
from fastgan.losses.adversarial import auxiliary_class_loss, gan_loss
from fastgan.losses.augmentation import augment
from fastgan.losses.noise import draw
from fastgan.losses.penalties import r1_penalty
from fastgan.models import DCGANDiscriminator, DCGANGenerator, SketchDiscriminator, SketchGenerator
from fastgan.recipes import available, load_recipe
from fastgan.training import Objective, RecipeGAN, build_networks
from fastgan.training.gan import SharedBatch, total
from fastgan.training.step.eager import Update

SMALL = {"resolution": 16, "image_channels": 1, "width": 8}
N = 6


def batch(sketches=False, resolution=16):
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(N, 1, resolution, resolution, generator=rng) * 2 - 1
    made = {"images": images, "labels": torch.arange(N) % 3}
    return made | ({"sketches": edge_map(images)} if sketches else {})


def gan(objective, *, norm="none", head="auxiliary"):
    torch.manual_seed(3)
    generator = DCGANGenerator(3, dim_z=4, **SMALL).eval()
    return RecipeGAN(generator, DCGANDiscriminator(3, norm=norm, head=head, **SMALL), objective)


def drawn(specs, seed=0):
    return draw(specs, torch.Generator().manual_seed(seed), "cpu")


def test_terms_of_an_auxiliary_classifier_with_penalties_by_hand():
    objective = Objective(
        gan_loss("wasserstein"),
        gradient_penalty=10,
        r1=2,
        class_weight_discriminator=3,
        class_weight_generator=0.5,
        class_loss_on_generated=True,
    )
    g, real = gan(objective), batch()
    draws = drawn(g.discriminator_draws(real))
    assert set(draws) == {"z", "alpha"}  # with a penalty, generated images share the labels of the real ones
    terms = g.discriminator_loss(real, draws)
    fake = g.generator(draws["z"], real["labels"]).detach()
    scores, classes = g.discriminator(real["images"], real["labels"])
    fake_scores, fake_classes = g.discriminator(fake, real["labels"])
    between = (real["images"] + draws["alpha"] * (fake - real["images"])).requires_grad_(True)
    (slope,) = torch.autograd.grad(g.discriminator(between, real["labels"])[0].sum(), between)
    expected = {
        "adversarial": fake_scores.mean() - scores.mean(),
        "class": 3
        * (auxiliary_class_loss(classes, real["labels"]) + auxiliary_class_loss(fake_classes, real["labels"])),
        "gradient_penalty": 10 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean(),
        "r1": 2 * r1_penalty(lambda x: g.discriminator(x, real["labels"])[0], real["images"]),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-4, atol=1e-6, check_dtype=True)
    torch.testing.assert_close(total(terms), sum(expected.values()).detach(), rtol=1e-4, atol=1e-6)

    draws = drawn(g.generator_draws(real))
    terms = g.generator_loss(real, draws)
    scores, classes = g.discriminator(g.generator(draws["z"], draws["labels"]), draws["labels"])
    torch.testing.assert_close(terms["adversarial"], -scores.mean())
    torch.testing.assert_close(terms["class"], 0.5 * auxiliary_class_loss(classes, draws["labels"]))


def test_lecam_consistency_and_adaptive_augmentation_by_hand():
    objective = Objective(
        gan_loss("hinge"), lecam=0.3, consistency=2.0, augment=("color",), augment_target=0.2, augment_images=100
    )
    g, real = gan(objective, head="plain"), batch()
    g.state["augment"].p.fill_(0.5)
    draws = drawn(g.discriminator_draws(real))
    terms = g.discriminator_loss(real, draws)

    def seen(images, prefix):
        changed = augment(images, ("color",), draws, prefix)
        return torch.where(draws[f"{prefix}.chosen"] < 0.5, changed, images)

    def score(images, labels):
        return g.discriminator(images, labels)

    labels, fake_labels = real["labels"], draws["labels"]
    images = seen(real["images"], "augment_real")
    fake = seen(g.generator(draws["z"], fake_labels).detach(), "augment_fake")
    logits, fake_logits = score(images, labels), score(fake, fake_labels)
    policy = ("flip", "translation")
    other = score(augment(images, policy, draws, "consistency_real"), labels)
    fake_other = score(augment(fake, policy, draws, "consistency_fake"), fake_labels)
    consistency = 2 * ((logits - other).square().mean() + (fake_logits - fake_other).square().mean())
    torch.testing.assert_close(terms["consistency"], consistency, rtol=1e-4, atol=1e-6)
    averages = 0.01 * torch.stack([logits.mean(), fake_logits.mean()]).detach()
    lecam = (logits - averages[1]).square().mean() + (fake_logits - averages[0]).square().mean()
    torch.testing.assert_close(terms["lecam"], 0.3 * lecam, rtol=1e-4, atol=1e-6)
    moved = 0.5 + float(torch.sign(logits.detach().sign().mean() - 0.2)) * N / 100
    torch.testing.assert_close(g.state["augment"].p, torch.tensor(moved))


@pytest.mark.parametrize("shared", [False, True])
def test_lazy_penalties_are_those_of_every_step(shared):
    changes = {"r1": 0.7, "r2": 0.4, "augment": ("color",)}
    always = gan(Objective(gan_loss("relativistic"), **changes), head="plain")
    lazy = gan(Objective(gan_loss("relativistic"), penalty_every=4, **changes), head="plain")
    real = batch()
    draws = drawn(always.discriminator_draws(real))
    given = SharedBatch({**real, **lazy.shared(real, draws)}) if shared else real
    terms = always.discriminator_loss(real, draws)
    rest = lazy.discriminator_loss(given, draws)
    assert terms.keys() - rest.keys() == {"r1", "r2"}
    torch.testing.assert_close(lazy.zero_centered_penalties(given, draws), terms["r1"] + terms["r2"])
    torch.testing.assert_close(rest["adversarial"], terms["adversarial"])


def test_batch_norm_sees_real_and_generated_images_apart():
    g, real = gan(Objective(gan_loss("non-saturating")), norm="batch", head="plain"), batch()
    draws = drawn(g.discriminator_draws(real))
    sizes = []
    g.discriminator.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    g.discriminator_loss(real, draws)
    assert sizes == [N, N]
    g = gan(Objective(gan_loss("non-saturating")), head="plain")
    g.discriminator.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    g.discriminator_loss(real, draws)
    assert sizes[2:] == [2 * N]


def test_the_critic_of_a_sketch_gan_sees_the_sketch_and_the_penalty_only_the_image():
    torch.manual_seed(2)
    generator = SketchGenerator(3, **SMALL).eval()
    critic = SketchDiscriminator(3, sees_sketch=True, **SMALL)
    g = RecipeGAN(generator, critic, Objective(gan_loss("wasserstein"), gradient_penalty=1))
    real = batch(sketches=True)
    draws = drawn(g.discriminator_draws(real))
    assert set(draws) == {"alpha"}
    terms = g.discriminator_loss(real, draws)
    fake = generator(real["sketches"], real["labels"]).detach()

    def score(images):
        return critic(torch.cat([images, real["sketches"]], 1), real["labels"])

    torch.testing.assert_close(terms["adversarial"], score(fake).mean() - score(real["images"]).mean())
    between = (real["images"] + draws["alpha"] * (fake - real["images"])).requires_grad_(True)
    (slope,) = torch.autograd.grad(score(between).sum(), between)
    expected = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean().detach()
    torch.testing.assert_close(terms["gradient_penalty"], expected, rtol=1e-4, atol=1e-6)


def test_augmentation_is_applied_to_both_sides_with_numbers_of_their_own():
    plain = Objective(gan_loss("hinge"))
    g, real = gan(replace(plain, augment=("translation", "cutout")), head="plain"), batch()
    draws = drawn(g.discriminator_draws(real))
    assert not torch.equal(draws["augment_real.translation.rows"], draws["augment_fake.translation.rows"])
    seen = []
    g.discriminator.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    g.discriminator_loss(real, draws)
    g.generator_loss(real, drawn(g.generator_draws(real)))
    assert (seen[0][:N] == 0).float().mean() == pytest.approx(0.2, abs=0.06)  # a quarter, less at the borders
    assert (seen[1] == 0).any()


def small(name):
    recipe = load_recipe(name)
    model = replace(
        recipe.model,
        resolution=16,
        generator_width=8,
        discriminator_width=8,
        attention_resolution=min(recipe.model.attention_resolution, 8),
    )
    torch.manual_seed(0)
    return RecipeGAN(*build_networks(model, 3, 1), Objective.of(recipe.train))


@pytest.mark.parametrize("name", [name for name in available() if not name.endswith("-digits")])
def test_losses_and_gradients_trace_as_one_graph_without_reading_a_value(name):
    g = small(name)
    real = batch(sketches=g.from_sketches)

    def gradients(batch, draws, draws_g):
        terms = g.discriminator_loss(batch, draws)
        d = torch.autograd.grad(total(terms), list(g.discriminator.parameters()))
        return d, torch.autograd.grad(total(g.generator_loss(batch, draws_g)), list(g.generator.parameters()))

    draws, draws_g = drawn(g.discriminator_draws(real)), drawn(g.generator_draws(real))
    # On fake tensors any branch on a value, .item() or comparison raises.
    graph = make_fx(gradients, tracing_mode="fake", _allow_non_fake_inputs=True)(real, draws, draws_g)
    called = {str(node.target) for node in graph.graph.nodes}
    assert not [op for op in called if "_local_scalar_dense" in op or "rand" in op]


def test_a_step_changes_one_network_and_leaves_no_gradients():
    g, real = gan(Objective(gan_loss("hinge")), head="plain"), batch()
    before = [p.detach().clone() for p in g.generator.parameters()]
    optimizer = torch.optim.SGD(g.discriminator.parameters(), lr=0.1)
    old = [p.detach().clone() for p in g.discriminator.parameters()]
    Update.of_gan(g, "discriminator", optimizer)(real, drawn(g.discriminator_draws(real)))
    assert all(torch.equal(a, b) for a, b in zip(before, g.generator.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(old, g.discriminator.parameters(), strict=True))
    assert all(p.grad is None for network in (g.generator, g.discriminator) for p in network.parameters())


def test_bad_combinations():
    with pytest.raises(ValueError, match="gradient penalties need a discriminator without batch norm"):
        gan(Objective(gan_loss("wasserstein"), gradient_penalty=1), norm="batch", head="plain")
    g = gan(Objective(gan_loss("hinge"), class_weight_discriminator=1), head="plain")
    with pytest.raises(ValueError, match="class_weight needs a discriminator with an auxiliary head"):
        g.discriminator_loss(batch(), drawn(g.discriminator_draws(batch())))


@pytest.mark.parametrize(("old", "new"), [("OwnGan", "FunctionalGAN"), ("Gan", "GAN"), ("RecipeGan", "RecipeGAN")])
def test_old_names_still_work_and_name_the_new_ones(old, new):
    with pytest.warns(DeprecationWarning, match=f"fastgan.training.{old} is now {new}"):
        assert getattr(training, old) is getattr(training, new)
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from fastgan.training import Nothing  # noqa: F401
