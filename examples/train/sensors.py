"""Trains `co2-forecast`, a recurrent forecaster, and `sea-temperature`, a linear regression, on real sensor series.

Data, as statsmodels ships it (public domain): the weekly CO2 at Mauna Loa, 1958 to 2001 (Keeling and Whorf), and the
monthly sea-surface temperature of the Niño 1+2 region, 1950 to 2010 (NOAA ERSST.V3B).
"""

import json

import numpy as np
import onnx
import torch
from folder import INPUTS, MODELS, write_description, write_json
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LinearRegression
from statsmodels.datasets import co2, elnino
from torch import Tensor, nn
from torch.nn import functional

SEED, CONTEXT, HORIZON, HIDDEN, SPREAD, YEAR = 7, 104, 13, 32, 3.0, 52
LAGS = 12
FEATURES = [f"month_minus_{lag}" for lag in range(LAGS, 0, -1)]

Floats = NDArray[np.float32]


def co2_series() -> Floats:
    """Weekly CO2 in ppm, gaps filled between their neighbours."""
    return np.asarray(co2.load_pandas().data["co2"].interpolate(), dtype=np.float32)


def sea_series() -> Floats:
    """Monthly sea-surface temperature in degrees Celsius."""
    return np.asarray(elnino.load_pandas().data.iloc[:, 1:], dtype=np.float32).reshape(-1)


def windows(series: Floats, context: int, horizon: int) -> tuple[Floats, Floats]:
    """Every window of `context` values and the `horizon` values after it."""
    view = np.lib.stride_tricks.sliding_window_view(series, context + horizon)
    return view[:, :context].copy(), view[:, context:].copy()


def split(series: Floats, context: int, share: float = 0.8) -> tuple[Floats, Floats]:
    """The first part of a series to train on, and the rest with the context that its first forecast needs."""
    border = int(len(series) * share)
    return series[:border], series[border - context :]


class Forecaster(nn.Module):
    """A GRU over how far each value is from the last one; ppm in, ppm out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(1, HIDDEN, batch_first=True), nn.Linear(HIDDEN, HORIZON)

    def forward(self, past_values: Tensor) -> Tensor:
        """[batch, 104] to [batch, 13]."""
        last = past_values[:, -1:]
        start = last.new_zeros(1, 1, HIDDEN).expand(-1, past_values.shape[0], -1)
        states, _ = self.cell(((past_values - last) / SPREAD)[:, :, None], start)
        forecast: Tensor = last + SPREAD * self.head(states[:, -1])
        return forecast


def train_forecaster(past: Floats, future: Floats, steps: int = 1500) -> Forecaster:
    """Fit the forecaster to the mean absolute error."""
    torch.manual_seed(SEED)
    model, generator = Forecaster(), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    inputs, targets = torch.from_numpy(past), torch.from_numpy(future)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (64,), generator=generator)
        noise = torch.randn(64, CONTEXT, generator=generator) * 0.1
        loss = functional.l1_loss(model(inputs[rows] + noise), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def error(forecast: Floats, truth: Floats) -> float:
    """The mean absolute error."""
    return float(np.abs(forecast - truth).mean())


def co2_baselines(past: Floats, truth: Floats) -> dict[str, float]:
    """Errors of two plain forecasts: the last value again, and last year's course moved to the last value."""
    same = np.repeat(past[:, -1:], HORIZON, axis=1)
    year = past[:, -YEAR : -YEAR + HORIZON] + past[:, -1:] - past[:, -YEAR - 1 : -YEAR]
    return {"persistence_mae_ppm": error(same, truth), "seasonal_naive_mae_ppm": error(year, truth)}


def make_co2() -> None:
    """Train, export, evaluate and describe `co2-forecast`."""
    folder = MODELS / "co2-forecast"
    before, after = split(co2_series(), CONTEXT)
    model = train_forecaster(*windows(before, CONTEXT, HORIZON))
    folder.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model,
        (torch.full((2, CONTEXT), 340.0),),
        str(folder / "model.onnx"),
        input_names=["past_values"],
        output_names=["forecast"],
        dynamic_axes={"past_values": {0: "batch"}, "forecast": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    past, truth = windows(after, CONTEXT, HORIZON)
    with torch.no_grad():
        scores = {"mae_ppm": error(model(torch.from_numpy(past)).numpy(), truth), **co2_baselines(past, truth)}
    config = {
        "architectures": ["GruForecaster"],
        "context_length": CONTEXT,
        "prediction_length": HORIZON,
        "hidden_size": HIDDEN,
        "frequency": "W",
        "unit": "ppm",
    }
    write_json(folder / "config.json", config)
    write_description(
        folder,
        {"task": "time-series-forecasting", "format": "onnx"},
        {"batch": 32},
        {"p95_ms": 200, "memory_mb": 300},
        {
            "source": "weekly atmospheric CO2 at Mauna Loa, Keeling and Whorf, as statsmodels ships it (public domain)",
            "licence": "Apache-2.0",
            "steps": ["train: examples/train/sensors.py"],
        },
        {name: round(value, 4) for name, value in scores.items()} | {"samples": len(truth)},
        [
            {
                "json": json.dumps({"inputs": [_numbers(past[row])]}),
                "content_type": "application/json",
                "tolerance": 0.01,
            }
            for row in (0, 150, 300)
        ],
    )
    write_json(INPUTS / "co2.json", {"inputs": _numbers(past[-1])})
    print("co2-forecast", scores)


def _numbers(row: Floats) -> list[float]:
    return [round(float(value), 2) for value in row]


def write_linear(weights: Floats, bias: float) -> None:
    """Write a linear regression as ONNX: `features` [batch, 12] to `prediction` [batch, 1]."""
    tensors = [
        numpy_helper.from_array(weights.astype(np.float32).reshape(LAGS, 1), "weight"),
        numpy_helper.from_array(np.array([bias], dtype=np.float32), "bias"),
    ]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["features", "weight", "bias"], ["prediction"])],
        "linear",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", LAGS])],
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["batch", 1])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    folder = MODELS / "sea-temperature"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")


def make_sea() -> None:
    """Fit, write, evaluate and describe `sea-temperature`."""
    folder = MODELS / "sea-temperature"
    before, after = split(sea_series(), LAGS)
    rows, targets = windows(before, LAGS, 1)
    fitted = LinearRegression().fit(rows.astype(np.float64), targets[:, 0])
    write_linear(np.asarray(fitted.coef_, dtype=np.float32), float(fitted.intercept_))
    past, truth = windows(after, LAGS, 1)
    scores = {
        "mae_celsius": error(fitted.predict(past.astype(np.float64)), truth[:, 0]),
        "r2": float(fitted.score(past.astype(np.float64), truth[:, 0])),
        "persistence_mae_celsius": error(past[:, -1], truth[:, 0]),
        "seasonal_naive_mae_celsius": error(past[:, 0], truth[:, 0]),
    }
    config = {
        "architectures": ["LinearRegression"],
        "feature_names": FEATURES,
        "target": "sea_surface_temperature_celsius",
        "num_features": LAGS,
    }
    write_json(folder / "config.json", config)
    write_description(
        folder,
        {"task": "tabular-regression", "format": "onnx"},
        {"batch": 256},
        {"p95_ms": 50, "memory_mb": 200},
        {
            "source": "monthly sea temperature of Niño 1+2, NOAA ERSST.V3B, as statsmodels ships it (public domain)",
            "licence": "Apache-2.0",
            "steps": ["train: examples/train/sensors.py"],
        },
        {name: round(value, 4) for name, value in scores.items()} | {"samples": len(truth)},
        [
            {"json": json.dumps({"inputs": value}), "content_type": "application/json", "tolerance": 0.001}
            for value in (
                _numbers(past[0]),
                [_numbers(past[9]), _numbers(past[90])],
                dict(zip(FEATURES, _numbers(past[40]), strict=True)),
            )
        ],
    )
    write_json(INPUTS / "sea.json", {"inputs": [_numbers(row) for row in past[-3:]]})
    print("sea-temperature", scores)


def main() -> None:
    """Make both models."""
    torch.set_num_threads(2)
    make_sea()
    make_co2()


if __name__ == "__main__":
    main()
