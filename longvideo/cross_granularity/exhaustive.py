"""Questions that count or order: the video is examined part by part, and the answer comes from the list of events."""

from longvideo.cross_granularity.rules import Asking, ControllerRules
from longvideo.cross_granularity.trace import CrossGranularityAnswer, ModuleCall, ModuleTurn, Round, VideoQuestion
from longvideo.processing.crossvllm import event_lists
from longvideo.processing.crossvllm.policies import as_text
from longvideo.processing.crossvllm.policy_json import find_object, strip_fences
from longvideo.processing.crossvllm.segment_times import cut_windows


def ask_everywhere(sample: VideoQuestion, rules: ControllerRules) -> Asking:
    """Examine every part of a video, then sum up.

    Args:
        sample: The question.
        rules: Length, overlap and largest number of the parts.

    Yields:
        The choice of parts where there are too many, then all parts at once, then the summing up.

    Returns:
        The answer with the events; its rounds are the calls in this order.

    Source: CrossVLLM, failure cases: ground and reflect segment by segment until all was perceived, then sum up.
    """
    rounds: list[Round] = []
    windows = cut_windows(sample.duration, length=rules.window_length, overlap=rules.window_overlap)
    numbers = list(range(len(windows)))
    if len(windows) > rules.max_windows:
        prompt = event_lists.rank_prompt(sample.question, sample.duration, windows, rules.max_windows)
        (text,) = yield [ModuleCall("coarse", sample, prompt)]
        rounds.append(Round(0, coarse=ModuleTurn(prompt, text)))
        numbers = event_lists.parse_ranking(text, len(windows), rules.max_windows)
    calls = [
        ModuleCall("fine", sample, event_lists.window_prompt(sample.question, windows[number]), windows[number])
        for number in numbers
    ]
    texts = yield calls
    events = []
    for number, call, text in zip(numbers, calls, texts, strict=True):
        rounds.append(Round(len(rounds), call.segment, fine=ModuleTurn(call.prompt, text)))
        events += event_lists.parse_events(text, call.segment, number)
    events = event_lists.merge_events(events, overlap=rules.window_overlap)
    prompt = event_lists.sum_up_prompt(sample.question, sample.duration, events)
    (text,) = yield [ModuleCall("coarse", sample, prompt)]
    rounds.append(Round(len(rounds), coarse=ModuleTurn(prompt, text)))
    # A module that was tuned to write policies may do so here too.
    found, _ = find_object(text, [("answer",)])
    answer = as_text(found.get("answer")) or ("" if found else strip_fences(text)) or counted(events)
    return CrossGranularityAnswer(sample.question, answer, None, "exhaustive", rounds, sample.duration, events)


def counted(events: list[event_lists.Event]) -> str:
    """Answer without a module: the number of events, and what they are.

    Args:
        events: The events in order.

    Returns:
        Such as "2: a door opens; a door closes".
    """
    return ": ".join(filter(None, [str(len(events)), "; ".join(event.text for event in events)]))
