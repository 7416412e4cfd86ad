"""The configuration of workers is the spec with every preset and default resolved."""

from starcoder_operator.domain.training_config import training_config
from starcoder_trainer.contract.config import TrainingConfig
from tests.support.runs import run


def config(**changes):
    return training_config("good", "default", "uid-1", run(**changes).spec)


def test_it_survives_the_wire():
    assert TrainingConfig.from_json(config().to_json()) == config()


def test_it_says_whose_it_is():
    identity = config().run
    assert (identity.name, identity.namespace, identity.uid) == ("good", "default", "uid-1")


def test_a_preset_gives_every_number():
    model = config(model={"preset": "starcoder-15b"}).model
    assert (model.layers, model.hidden_size, model.attention_heads, model.head_dim) == (40, 6144, 48, 128)
    assert (model.ffn_hidden_size, model.query_groups, model.vocab_size) == (24576, 1, 49152)
    assert (model.init_std, model.dropout) == (0.01275, 0.1)


def test_a_number_beside_the_preset_wins():
    model = config(model={"preset": "starcoder-15b", "layers": 8, "dropout": 0.0}).model
    assert (model.layers, model.dropout, model.hidden_size) == (8, 0.0, 6144)


def test_the_sequence_is_as_long_as_the_model_allows_unless_said():
    assert config(data__sequenceLength=None).data.sequence_length == 1024
    assert config(data__sequenceLength=None, model__maxSequenceLength=512).data.sequence_length == 512
    assert config().data.sequence_length == 256


def test_the_optimizer_is_starcoders():
    optimizer = config(training__optimizer={}, training__iterations=250000).training.optimizer
    assert optimizer.lr == 2e-3
    assert abs(optimizer.min_lr - 2e-4) < 1e-12
    assert optimizer.warmup_iterations == 2000
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)


def test_a_short_run_warms_up_for_a_tenth_of_it():
    assert config(training__iterations=100).training.optimizer.warmup_iterations == 10


def test_a_warmup_of_nothing_stays_nothing():
    assert config(training__optimizer__warmupIterations=0).training.optimizer.warmup_iterations == 0


def test_a_last_rate_of_nothing_stays_nothing():
    assert config(training__optimizer__minLr=0).training.optimizer.min_lr == 0


def test_sources_keep_order_and_weight():
    assert [(s.uri, s.weight) for s in config().data.sources] == [("s3://corpus/a", 0.3), ("s3://corpus/b", 0.7)]


def test_half_of_the_documents_are_fill_in_the_middle_unless_said():
    fim = config().data.fim
    assert (fim.rate, fim.spm_rate) == (0.5, 0.5)
    assert config(data__fim={"rate": 0}).data.fim.rate == 0


def test_storage_and_checkpoints_are_carried():
    found = config(
        storage={"endpoint": "http://s3:1", "region": "r", "pathStyle": True},
        checkpoint={"uri": "s3://k/x", "everyIterations": 7, "keepLast": 2, "resume": "Adopt"},
    )
    assert (found.storage.endpoint, found.storage.region, found.storage.path_style) == ("http://s3:1", "r", True)
    assert (found.checkpoint.uri, found.checkpoint.every_iterations) == ("s3://k/x", 7)
    assert (found.checkpoint.keep_last, found.checkpoint.resume) == (2, "Adopt")


def test_no_secret_is_in_it():
    assert "s3-credentials" not in config(storage__credentialsSecret="s3-credentials").to_json()
