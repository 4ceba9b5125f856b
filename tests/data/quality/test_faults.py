"""One planted fault each: the right finding, the right lines, and nothing else."""

import pytest

from luthier.data.quality import Check, checks
from tests.data.conftest import CHATML, byte_bpe
from tests.data.quality.conftest import good

ROWS = 40


def planted(*odd):
    """Good rows with odd ones in known places: lines 11, 21, 31."""
    rows = [good(i) for i in range(ROWS)]
    for at, row in zip((10, 20, 30), odd, strict=False):
        rows[at] = row
    return rows


def turns(*said):
    return {"messages": [{"role": r, "content": c} for r, c in said]}


def chats(*odd):
    return [r if "messages" in r else turns(("user", r["prompt"]), ("assistant", r["completion"])) for r in planted(*odd)]


def test_good_rows_have_no_finding(check):
    assert check(planted()).findings == {}


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_roles_out_of_order_are_counted_with_their_lines(check):
    found = check(chats(turns(("assistant", "Hello.")), turns(("user", "A?"), ("system", "B."), ("assistant", "C.")), turns(("bot", "x"))))
    assert found.severities() == {"role_order": "error"} and found.lines("role_order") == [11, 21, 31]


def test_rows_with_nothing_to_learn_are_labels_lost(check):
    silent = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "weight": 0}]}
    found = check(chats(silent, turns(("user", "Why?"))))
    assert found.severities() == {"labels_lost": "error"} and found.lines("labels_lost") == [11, 21]


def test_empty_answers_and_nulls_are_empty_rows(check):
    found = check(planted({"prompt": "Why?", "completion": "  "}, {"prompt": "Why?", "completion": None}))
    assert found.severities() == {"empty": "error"} and found.lines("empty") == [11, 21]


def test_lines_that_are_no_json_are_malformed_and_the_rows_behind_them_keep_their_lines(check):
    rows = planted("{'single': quotes}", {"prompt": "Why?", "completion": ""})
    found = check(rows)
    assert found.lines("malformed") == [11] and found.lines("empty") == [21]


def test_half_a_character_is_found_although_the_tokenizer_stops_at_it(check):
    found = check(planted('{"prompt": "Why is this?", "completion": "Because \\ud83d of that."}'))
    assert found.severities() == {"surrogates": "error"} and found.lines("surrogates") == [11]


def test_a_beginning_token_in_the_text_and_in_the_template_is_twice(check):
    template = "{{ bos_token }}" + CHATML.replace("<|im_start|>' + m['role'] + '\n' + ", "' + ").replace("<|im_end|>", "</s>")
    odd = {"prompt": "<s>Why is this?", "completion": "Because of that."}
    found = check(planted(odd), tokenizer=byte_bpe(bos=True, template=template))
    assert found.lines("double_bos") == [11] and found.findings["double_bos"].severity == "error"


def test_tool_calls_that_are_no_json_are_named(check):
    call = {"conversations": [{"from": "human", "value": "Time?"}, {"from": "function_call", "value": "{broken"}]}
    fine = {"conversations": [{"from": "human", "value": "Time, please?"}, {"from": "gpt", "value": "It is seven."}]}
    found = check([fine, call])
    assert found.lines("tool_calls_unread") == [2]


# --- too long, never ending ------------------------------------------------------------------------------------------


def test_a_response_that_no_token_is_left_of_is_lost_and_one_without_its_end_is_cut(check):
    template = "{%- for m in messages %}{{ m['content'] if m['role'] == 'assistant' else '" + "preamble " * 60 + "' + m['content'] }}{%- endfor %}"
    found = check([good(0), {"prompt": "Q?", "completion": "A."}], tokenizer=byte_bpe(template=template), max_tokens=60)
    assert found.lines("response_lost") == [1, 2] and found.findings["response_lost"].severity == "error"
    found = check(planted({"prompt": "Count.", "completion": " ".join(map(str, range(400)))}), max_tokens=200)
    assert found.severities() == {"response_cut": "warning"} and found.lines("response_cut") == [11]
    assert found.report.policy | {"tokens_over": 0} == {"over": 1, "prompt_cut": 0, "response_cut": 1, "lost": 0, "pieces": 1, "tokens_over": 0}


def test_a_long_prompt_is_cut_and_the_response_kept_which_is_no_finding(check):
    found = check(planted({"prompt": " ".join(map(str, range(400))), "completion": "Many numbers."}), max_tokens=200)
    assert found.findings == {} and found.report.policy["prompt_cut"] == 1


def test_without_an_end_token_every_row_lacks_its_end(check):
    found = check(
        planted(),
        tokenizer=byte_bpe(eos=None),
    )
    assert found.findings["missing_end"].severity == "error" and found.lines("missing_end") == list(range(1, ROWS + 1))


def test_a_text_of_one_token_trains_nothing(check):
    found = check([{"text": "a"}, {"text": "A longer text than that one."}], renders="text", tokenizer=byte_bpe(eos=None))
    assert found.lines("nothing_trained") == [1]


def test_few_trained_tokens_are_said(check):
    rows = [{"prompt": good(i)["prompt"] * 12, "completion": "Yes, it is number " + str(i)} for i in range(20)]
    found = check(rows, max_tokens=2000)
    assert found.severities() == {"little_trained": "warning"} and found.findings["little_trained"].n == found.report.trained


# --- twice -----------------------------------------------------------------------------------------------------------


def test_exact_duplicates_are_counted_beside_their_first(check):
    found = check(planted(good(2), good(3), good(2)))
    assert found.severities() == {"exact_duplicates": "warning"}
    assert found.lines("exact_duplicates") == [11, 21, 31] and found.beside("exact_duplicates") == [3, 4, 3]


def test_near_duplicates_are_found_in_other_words_of_one_place_and_not_in_others(check):
    text = "The ferry crosses the wide river every morning at seven and returns from the far bank each evening before the lamps along the quay are lit by hand"
    one = {"prompt": "When does the ferry go?", "completion": text}
    almost = {"prompt": "When does the ferry go?", "completion": text.replace("evening", "night")}
    other = {"prompt": "When does the ferry go?", "completion": text.replace("river", "lake").replace("seven", "eight").replace("far", "near")}
    found = check(planted(one, almost, other))
    assert found.lines("near_duplicates") == [21] and found.beside("near_duplicates") == [11]
    assert found.lines("several_answers") == [21, 31]
    assert "near_duplicates" not in check(planted(one, almost, other), near=0.95).findings


def test_one_text_under_two_labels_is_a_conflict(check):
    rows = [{"text": good(i)["prompt"], "label": "ab"[i % 2]} for i in range(30)]
    rows[12] = rows[4] | {"label": "b"}
    found = check(rows, renders="label")
    assert found.severities() == {"label_conflicts": "warning"} and found.lines("label_conflicts") == [13] and found.beside("label_conflicts") == [5]


def test_pairs_that_are_judged_both_ways_round_contradict(check):
    rows = [{"prompt": g["prompt"], "chosen": g["completion"], "rejected": f"No idea at all, {i}."} for i, g in ((i, good(i)) for i in range(12))]
    rows[7] = {"prompt": rows[1]["prompt"], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    found = check(rows, renders="pairs")
    assert found.lines("label_conflicts") == [8] and found.beside("label_conflicts") == [2]


# --- leaks -----------------------------------------------------------------------------------------------------------


def test_held_out_rows_in_the_training_data_are_leaks(check):
    held = {"test": [good(500), good(7), good(501)], "validation": [good(502), good(9) | {"completion": "Something else entirely is said here."}]}
    found = check([good(i) for i in range(ROWS)], held=held)
    assert found.severities() == {"leak_test": "error", "leak_validation": "error"}  # a whole question of many words is enough
    assert found.lines("leak_test") == [2] and found.beside("leak_test") == [8]
    assert found.lines("leak_validation") == [2] and found.beside("leak_validation") == [10]


def test_a_benchmark_question_inside_a_longer_text_is_found_by_its_runs_of_words(check):
    question = "A farmer plants eleven rows of apple trees with nine trees in every row and then sells a third of all the apples he picks at the fair"
    text = f"Some lecture notes. {question}. Then the class went on to talk about something else, which took the rest of the hour."
    docs = [{"text": good(i)["completion"]} for i in range(20)]
    docs[14] = {"text": text}
    found = check(docs, renders="text", held={"against": [{"q": good(800)["prompt"], "id": 4}, {"q": question + ".", "id": 5}]})
    assert found.severities() == {"leak_against": "error"}
    assert found.lines("leak_against") == [2] and found.beside("leak_against") == [15]


def test_a_prompt_that_all_rows_share_is_no_leak(check):
    frame = "Read the following sentence with great care and say in one word whether the person who wrote it was happy or unhappy when it was written:"
    rows = [{"prompt": f"{frame} {good(i)['prompt']}", "completion": good(i)["completion"]} for i in range(60)]
    held = [{"prompt": f"{frame} {good(i)['prompt']}", "completion": good(i)["completion"]} for i in range(600, 640)]
    assert check(rows, held={"test": held}).findings == {}


# --- words -----------------------------------------------------------------------------------------------------------


def test_openings_closings_and_sentences_of_many_responses_are_boilerplate(check):
    rows = [good(i) for i in range(ROWS)]
    for i in range(0, 30, 2):
        rows[i] = good(i) | {"completion": f"Thank you for your question! {good(i)['completion']} Please consult a licensed expert first. Number {i} is it."}
    found = check(rows)
    assert found.severities() == {"repeated_opening": "warning", "repeated_sentence": "warning"}
    assert found.lines("repeated_opening") == list(range(1, 31, 2)) == found.lines("repeated_sentence")
    assert "Please consult a licensed expert first." in found.findings["repeated_sentence"].said


def test_encoding_faults_are_told_apart(check):
    odd = [
        {"prompt": "Where is the cafÃ© of the town?", "completion": "Itâ€™s behind the church, near schÃ¶ne Aussicht."},
        {"prompt": "What did he say?", "completion": "He said it was d\ufffdj\ufffd vu."},
        {"prompt": "What is written there?", "completion": "It reads \x1b[1mbold\x07 there."},
    ]
    found = check(planted(*odd))
    assert found.severities() == {"mojibake": "warning", "replacement_characters": "warning", "control_characters": "warning"}
    assert [found.lines(n) for n in ("mojibake", "replacement_characters", "control_characters")] == [[11], [21], [31]]
    odd = [
        {"prompt": "Who is it?", "completion": "zero\u200bwidth it is."},
        {"prompt": "Who pays?", "completion": "P\u0430ypal does."},
        {"prompt": "Which?", "completion": "R&amp;B it is."},
    ]
    found = check(planted(*odd))
    assert found.severities() == {"unseen_characters": "note", "mixed_scripts": "note", "entities": "note"}
    assert [found.lines(n) for n in ("unseen_characters", "mixed_scripts", "entities")] == [[11], [21], [31]]


def test_text_with_accents_and_other_scripts_is_no_fault(check):
    odd = [
        {"prompt": "Où est le café ?", "completion": "À côté de l’église, « chez Zoë »."},
        {"prompt": "Где музей?", "completion": "За мостом, рядом с рынком."},
        {"prompt": "博物館はどこですか？", "completion": "橋の向こう側です。👩‍🌾"},
    ]
    assert not {"mojibake", "mixed_scripts", "unseen_characters", "control_characters"} & check(planted(*odd)).findings.keys()


def test_rows_in_another_language_are_noted(check):
    odd = {"prompt": "Und auf Deutsch?", "completion": "Das Museum liegt hinter der Brücke, gleich neben dem alten Markt am Fluss."}
    rows = [good(i) | {"completion": f"The museum is open until {i % 12} o'clock, and the visitors may walk along the river before that."} for i in range(ROWS)]
    rows[10] = odd
    found = check(rows, near=1.0)
    assert found.lines("languages") == [11] and found.findings["languages"].severity == "note"


# --- labels ----------------------------------------------------------------------------------------------------------


def test_uneven_labels_and_labels_written_in_two_ways_are_warned_of(check):
    rows = [{"text": good(i)["prompt"], "label": "rare" if i in (3, 17) else "usual"} for i in range(ROWS)]
    found = check(rows, renders="label")
    assert found.severities() == {"imbalance": "warning", "rare_labels": "note"}
    assert found.lines("imbalance") == [4, 18] and found.findings["imbalance"].n == 2
    rows = [{"text": good(i)["prompt"], "label": ("Yes", "no", "yes")[2 if i == 8 else i % 2]} for i in range(ROWS)]
    found = check(rows, renders="label")
    assert found.lines("label_spellings") == [9] and "'Yes'" in found.findings["label_spellings"].said


def test_short_answers_of_a_chat_are_counted_as_labels(check):
    found = check([{"prompt": good(i)["prompt"], "completion": "No" if i % 20 == 5 else "Yes"} for i in range(60)])
    assert found.severities() == {"imbalance": "warning"} and found.findings["imbalance"].n == 3


def test_labels_that_only_held_out_rows_have_are_errors(check):
    rows = [{"text": good(i)["prompt"], "label": "ab"[i % 2]} for i in range(30)]
    found = check(
        rows, renders="label", held={"test": [{"text": "Quite another text, this one.", "label": "c"}, {"text": "And one more of them.", "label": "a"}]}
    )
    assert found.severities() == {"unknown_labels": "error"} and found.lines("unknown_labels") == [1]


def test_pairs_without_a_difference_and_pairs_that_length_decides(check):
    rows = [{"prompt": g["prompt"], "chosen": g["completion"] + f" So it is, {i}.", "rejected": f"No, {i}."} for i, g in ((i, good(i)) for i in range(30))]
    rows[4]["rejected"] = rows[4]["chosen"]
    found = check(rows, renders="pairs")
    assert found.lines("same_answers") == [5] and found.findings["length_tells"].n == 29


# --- templates -------------------------------------------------------------------------------------------------------


def test_special_tokens_other_models_ends_and_markers_are_told_apart(check):
    odd = [
        {"prompt": "Why <|im_end|> so?", "completion": "Because of that."},
        {"prompt": "Why is it so?", "completion": "Because of this.<|eot_id|>"},
        {"prompt": "[INST] Why is it? [/INST]", "completion": "Because it is."},
    ]
    found = check(planted(*odd))
    assert found.severities() == {"special_tokens": "warning", "foreign_ends": "warning", "foreign_markers": "warning"}
    assert [found.lines(n) for n in ("special_tokens", "foreign_ends", "foreign_markers")] == [[11], [21], [31]]


def test_thinking_tags_are_balanced_or_named_and_thoughts_that_are_left_out_are_found(check):
    odd = [
        {"prompt": "Two and two?", "completion": "<think>Easy. Four."},
        {"prompt": "Two and three?", "completion": "<think>That is five.</think>Five."},
    ]
    found = check(planted(*odd))
    assert found.severities() == {"thinking_unbalanced": "warning", "thinking_mixed": "note"}
    assert found.lines("thinking_unbalanced") == [11] and found.lines("thinking_mixed") == [11, 21]
    thought = {"messages": [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "Nine.", "reasoning_content": "Four and five make nine."}]}
    found = check(chats(thought))
    assert found.lines("thinking_left_out") == [11]


def test_blanks_and_conversations_that_end_with_a_question_are_noted(check):
    found = check(chats(turns(("user", "Who are you?"), ("assistant", "I am {{name}}.")), turns(("user", "A?"), ("assistant", "B, it is."), ("user", "C?"))))
    assert found.lines("placeholders") == [11] and found.lines("unanswered") == [21]


def test_tools_that_are_called_and_not_declared_or_with_other_arguments(check):
    tool = {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}}

    def called(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        asked = {"role": "user", "content": f"Time in {arguments}?"}
        return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}

    found = check([called("clock", {"zone": "UTC"}), called("watch", {"zone": "CET"}), called("clock", {"city": "Rome"})])
    assert found.lines("tools_undeclared") == [2] and found.lines("tool_arguments") == [3]


def test_long_answers_that_stop_in_a_sentence_are_noted_and_lists_are_not(check):
    long = "This is told at some length, since the story of the bridge is long and has many parts. " * 4
    rows = planted(
        {"prompt": "Tell me.", "completion": long + "And then the builders went to the other side and"},
        {"prompt": "List.", "completion": long + "\n- the last entry of this list is as long as a sentence is"},
    )
    assert check(rows).lines("broken_off") == [11]


def test_an_empty_prompt_is_a_warning(check):
    assert check(planted({"prompt": " ", "completion": "An answer to nothing."})).severities() == {"empty_prompts": "warning"}


# --- the folder of checks --------------------------------------------------------------------------------------------


def test_every_class_in_the_folder_is_a_check_that_runs(check):
    found = check(planted())
    names = {type(c).__name__ for c in found.inspection.checks}
    assert len(names) >= 14 and {"Unusable", "Lengths", "Endings", "Repeats", "Leaks", "Boilerplate", "Balance", "Encoding", "Markers", "Tools"} <= names
    assert all(isinstance(c, Check) for c in checks(found.inspection.setting))


@pytest.mark.parametrize("renders", ["chat", "text", "label", "pairs", "judged"])
def test_every_kind_of_rows_can_be_checked(check, renders):
    g = [good(i) for i in range(12)]
    rows = {
        "chat": g,
        "text": [{"text": x["completion"]} for x in g],
        "label": [{"text": x["prompt"], "label": "ab"[i % 2]} for i, x in enumerate(g)],
        "pairs": [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": x["prompt"]} for x in g],
        "judged": [{"prompt": x["prompt"], "completion": x["completion"], "label": i % 2 == 0} for i, x in enumerate(g)],
    }[renders]
    found = check(rows, renders=renders)
    assert found.findings == {} and len(found.report.lengths) == 12 and found.report.lengths.min() > 5
