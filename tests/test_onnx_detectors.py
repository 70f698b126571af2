"""Detectors of users' ONNX files: graphs with the outputs of YuNet, SCRFD and RetinaFace, and known faces in them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtl_dist.errors import InputError
from mtl_dist.faces.detector import open_detector

SIDE = 96
STRIDES = (8, 16, 32)
BOX = np.array([20, 30, 52, 70], np.float32)
POINTS = np.array([[28, 42], [44, 43], [36, 51], [30, 60], [43, 59]], np.float32)
PICTURE = np.zeros((SIDE, SIDE, 3), np.uint8)


def write_constant_net(path: Path, outputs: dict[str, np.ndarray], *, shape: list = (1, 3, SIDE, SIDE)) -> Path:
    """Write a network that answers the same to every picture."""
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))
    nodes, infos = [], []
    for name, value in outputs.items():
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value.astype(np.float32))))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape))
    graph = helper.make_graph(nodes, "net", [picture], infos)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


def of_yunet(faces: list[tuple[np.ndarray, np.ndarray, float]]) -> dict[str, np.ndarray]:
    """Encode faces as YuNet does, each at the place of the map of an 8th that is nearest to its middle."""
    outputs = {}
    for stride in STRIDES:
        places = (SIDE // stride) ** 2
        for name, columns in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            outputs[f"{name}_{stride}"] = np.zeros((1, places, columns))
    for box, points, score in faces:
        middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        column, row = (middle // 8).astype(int)
        at = row * (SIDE // 8) + column
        outputs["cls_8"][0, at], outputs["obj_8"][0, at] = score, score
        outputs["bbox_8"][0, at] = [*(middle / 8 - (column, row)), *np.log(size / 8)]
        outputs["kps_8"][0, at] = (points / 8 - (column, row)).ravel()
    return outputs


def of_scrfd(faces: list[tuple[np.ndarray, np.ndarray, float]], *, batch: bool = False) -> dict[str, np.ndarray]:
    """Encode faces as SCRFD does: two anchors a place; in the map of a 16th, in the second anchor of a place."""
    outputs = {}
    for name, columns in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in STRIDES:
            outputs[f"{name}_{stride}"] = np.zeros(((SIDE // stride) ** 2 * 2, columns))
    for box, points, score in faces:
        column, row = ((box[:2] + box[2:]) / 2 // 16).astype(int)
        place = np.array([column, row]) * 16
        at = (row * (SIDE // 16) + column) * 2 + 1
        outputs["score_16"][at] = score
        outputs["bbox_16"][at] = np.concatenate([place - box[:2], box[2:] - place]) / 16
        outputs["kps_16"][at] = ((points - place) / 16).ravel()
    return {name: value[None] if batch else value for name, value in outputs.items()}


def of_retinaface(faces: list[tuple[np.ndarray, np.ndarray, float]], *, softmax: bool = True) -> dict[str, np.ndarray]:
    """Encode faces as RetinaFace does: by the larger prior, 64 pixels, of a place of the map of a 16th."""
    count = sum((SIDE // stride) ** 2 * 2 for stride in STRIDES)
    loc, conf, landms = np.zeros((1, count, 4)), np.tile([1.0, 0.0], (1, count, 1)), np.zeros((1, count, 10))
    for box, points, score in faces:
        middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        column, row = (middle // 16).astype(int)
        prior = (np.array([column, row]) + 0.5) * 16
        at = (SIDE // 8) ** 2 * 2 + (row * (SIDE // 16) + column) * 2 + 1
        loc[0, at] = [*((middle - prior) / 64 / 0.1), *(np.log(size / 64) / 0.2)]
        conf[0, at] = [1 - score, score]
        landms[0, at] = ((points - prior) / 64 / 0.1).ravel()
    return {"loc": loc, "conf": conf if softmax else np.log(np.maximum(conf, 1e-4)), "landms": landms}


ENCODERS = {
    "yunet": of_yunet,
    "scrfd": of_scrfd,
    "scrfd, with a batch": lambda faces: of_scrfd(faces, batch=True),
    "retinaface": of_retinaface,
    "retinaface, without softmax": lambda faces: of_retinaface(faces, softmax=False),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_face_is_read_as_each_kind_of_network_encodes_it(kind, tmp_path):
    net = write_constant_net(tmp_path / "net.onnx", ENCODERS[kind]([(BOX, POINTS, 0.9)]))
    detector = open_detector(net)
    (face,) = detector(PICTURE)
    assert detector.name == f"{kind.split(',')[0]} (net.onnx)"
    np.testing.assert_allclose(face.box, BOX, atol=1e-3)
    np.testing.assert_allclose(face.points, POINTS, atol=1e-3)
    assert face.confidence == pytest.approx(0.9, abs=1e-3)
    assert open_detector(net, min_confidence=0.95)(PICTURE) == []


@pytest.mark.parametrize("kind", ["yunet", "scrfd", "retinaface"])
def test_faces_come_back_in_pixels_of_the_picture_and_of_two_that_overlap_the_surer_one(kind, tmp_path):
    other, twin = BOX + 34, BOX + np.float32([12, 0, 12, 0])
    faces = [(other, POINTS + 34, 0.7), (BOX, POINTS, 0.95), (twin, POINTS + 4, 0.8)]
    detector = open_detector(write_constant_net(tmp_path / "net.onnx", ENCODERS[kind](faces)))
    found = detector(np.zeros((SIDE * 2, SIDE * 4, 3), np.uint8))  # shown to the network at a quarter, with black below
    assert [round(face.confidence, 2) for face in found] == [0.95, 0.7]
    np.testing.assert_allclose(found[0].points, POINTS * 4, atol=1e-2)
    np.testing.assert_allclose(found[1].box, other * 4, atol=1e-2)
    assert [round(face.confidence, 2) for face in detector(PICTURE[:70])] == [0.95, 0.7]  # as it is: not enlarged


def write_reading_net(path: Path, *, size: list) -> Path:
    """Write a YuNet of any size that is as sure of each place as it is blue there, and lays a box of 16 pixels."""
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, *size])
    nodes, infos = [helper.make_node("Slice", ["input", "from", "to", "axis"], ["blue"])], []
    constants = {"from": [0], "to": [1], "axis": [1], "flat": [1, -1, 1], "by": np.array(1 / 255, np.float32)}
    for stride in STRIDES:
        nodes += [
            helper.make_node("AveragePool", ["blue"], [f"a{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2),
            helper.make_node("Mul", [f"a{stride}", "by"], [f"m{stride}"]),
            helper.make_node("Reshape", [f"m{stride}", "flat"], [f"cls_{stride}"]),
            helper.make_node("Identity", [f"cls_{stride}"], [f"obj_{stride}"]),
        ]
        for name, columns in (("bbox", 4), ("kps", 10)):
            constants[f"{name}{stride}"] = np.full((1, 1, columns), np.log(2) if columns == 4 else 0.5, np.float32)
            nodes += [
                helper.make_node("Mul", [f"cls_{stride}", "none"], [f"zero{name}{stride}"]),
                helper.make_node("Add", [f"zero{name}{stride}", f"{name}{stride}"], [f"{name}_{stride}"]),
            ]
        for name, columns in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            infos.append(helper.make_tensor_value_info(f"{name}_{stride}", TensorProto.FLOAT, [1, None, columns]))
    constants["none"] = np.array(0, np.float32)
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", [picture], infos, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("size", [["h", "w"], [128, 192]])
def test_a_network_sees_the_picture_in_its_place_and_colours(size, tmp_path):
    detector = open_detector(write_reading_net(tmp_path / "net.onnx", size=size))
    picture = np.zeros((100, 150, 3), np.uint8)
    picture[40:48, 96:104] = 0, 0, 255
    picture[8:16, 8:16] = 255, 0, 0
    (face,) = detector(picture)
    np.testing.assert_allclose(face.points, np.full((5, 2), [100, 44]), atol=1e-3)
    assert (face.box[0] < 100 < face.box[2], face.box[1] < 44 < face.box[3]) == (True, True)


def test_an_unknown_layout_is_one_message_that_lists_the_outputs(tmp_path):
    net = write_constant_net(tmp_path / "net.onnx", {"boxes": np.zeros((1, 100, 4)), "scores": np.zeros((1, 100, 1))})
    told = r"net.onnx is no detector that is known: for a picture of 96 x 96 its outputs are 100 x 4, 100 x 1; expected"
    with pytest.raises(InputError, match=told):
        open_detector(net)
    six = {name: value for name, value in of_scrfd([]).items() if not name.startswith("kps")}
    with pytest.raises(InputError, match=r"expected those of YuNet .*SCRFD with points"):
        open_detector(write_constant_net(tmp_path / "boxes.onnx", six))


def test_what_is_no_network_for_pictures_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no detector at .*gone\.onnx; expected an ONNX file"):
        open_detector(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(InputError, match=r"text\.onnx cannot be read as ONNX"):
        open_detector(tmp_path / "text.onnx")
    bytes_in = write_constant_net(tmp_path / "gray.onnx", of_yunet([]), shape=[1, 1, SIDE, SIDE])
    with pytest.raises(InputError, match=r"reads input tensor\(float\) \[1, 1, 96, 96\]; a detector reads one float"):
        open_detector(bytes_in)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"need onnxruntime.*pip install 'mtl_dist\[export\]'"):
        open_detector(bytes_in)


def test_values_that_are_no_numbers_are_no_faces(tmp_path):
    outputs = of_scrfd([(BOX, POINTS, 0.9)])
    outputs["kps_16"][:] = np.nan
    assert open_detector(write_constant_net(tmp_path / "net.onnx", outputs))(PICTURE) == []
