"""Evaluation: predictions of every example, metrics, calibration, baselines, significance.

``run`` predicts and scores; the metrics are plain functions ``metric(predictions, labels)`` in
float64 numpy, usable on their own.
"""

from steppe.train.evaluate.answers import SquadScores, answer_scores, squad, token_spans
from steppe.train.evaluate.baseline import (
    Features,
    LogisticRegression,
    Majority,
    features,
    logistic_regression,
    majority,
)
from steppe.train.evaluate.calibration import (
    Reliability,
    brier,
    expected_calibration_error,
    log_loss,
    reliability_curve,
)
from steppe.train.evaluate.classification import (
    PRF,
    accuracy,
    confusion_matrix,
    f1,
    mcc,
    per_class_scores,
    precision_recall_f1,
)
from steppe.train.evaluate.correlation import (
    mean_absolute_error,
    mean_squared_error,
    pearson,
    spearman,
)
from steppe.train.evaluate.generation import bleu, chrf, perplexity
from steppe.train.evaluate.language import Generated, text_metrics, token_bytes, token_metrics
from steppe.train.evaluate.options import OptionScores, option_accuracy
from steppe.train.evaluate.predict import Predict, Predictor, predictor
from steppe.train.evaluate.runner import EvalResult, run
from steppe.train.evaluate.significance import (
    Comparison,
    Interval,
    McNemar,
    bootstrap,
    mcnemar,
    paired_bootstrap,
)
from steppe.train.evaluate.tagging import Entity, EntityScores, entities, entity_f1

__all__ = [
    "PRF",
    "Comparison",
    "Entity",
    "EntityScores",
    "EvalResult",
    "Features",
    "Generated",
    "Interval",
    "LogisticRegression",
    "Majority",
    "McNemar",
    "OptionScores",
    "Predict",
    "Predictor",
    "Reliability",
    "SquadScores",
    "accuracy",
    "answer_scores",
    "bleu",
    "bootstrap",
    "brier",
    "chrf",
    "confusion_matrix",
    "entities",
    "entity_f1",
    "expected_calibration_error",
    "f1",
    "features",
    "log_loss",
    "logistic_regression",
    "majority",
    "mcc",
    "mcnemar",
    "mean_absolute_error",
    "mean_squared_error",
    "option_accuracy",
    "paired_bootstrap",
    "pearson",
    "per_class_scores",
    "perplexity",
    "precision_recall_f1",
    "predictor",
    "reliability_curve",
    "run",
    "spearman",
    "squad",
    "text_metrics",
    "token_bytes",
    "token_metrics",
    "token_spans",
]
