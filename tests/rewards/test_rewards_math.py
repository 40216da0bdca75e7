"""The maths verifier: extraction, exact comparison, and math-verify behind a process that can be killed."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_fast.rewards.math import (
    UNITS,
    MathVerifier,
    compare_fast,
    extract_answer,
    normalise,
    number,
    too_complex,
    unit,
)
from omni_fast.rewards.score import Part

ANY_TEXT = st.text(st.characters(exclude_categories=()))
MATHS = st.text(alphabet="0123456789.,/-+^!{}()[]\\$%= \nboxedfracanswer#<>−", max_size=120)


# between two guesses; math-verify alone reads the first or the last of them
SECOND_NUMBERS = (
    r"\text{ or 13}", r"\mbox{ or 13}", r"\tag{13}", "~13", r"\\13", r"\&13", "&13", "?13", "@13", r"\approx 13", "_{13}",
    "..13", r"\dots,13", r"\quad 13", r"\lor 13", r"\wedge 13", r"\mid 13", r"\cup 13", r"\sim 13", r"\in 13", r"\iff 13",
    r"\therefore 13", r"\circ 13", r"\underset{13}{}", ",13", ";13",
)  # fmt: skip

COMPARISONS = (
    r"\leq", r"\geq", r"\geqslant", r"\lt", r"\gt", r"\ne", r"\neq", r"\not=", r"\neg", r"\in", r"\sim", "<", ">", "≥", "≠",
    "<=", "!=",
)  # fmt: skip


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(workers=1) as verifier:
        yield verifier


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{unclosed", None),
        (r"\boxed{}", None),
        ("work 1 + 2\n#### 1,234\n", "1,234"),
        ("#### 3 ####", None),
        ("<answer> 5 </answer>", "5"),
        (r"<answer>\boxed{6}</answer>", "6"),
        (r"\boxed{6} no: #### 7", "7"),
        ("the answer is 18.", "18"),
        ("the answer is $x+1$.", "x+1"),
        (r"So the answer is $\$18$.", r"\$18"),
        (r"The final answer is: \(2\pi\)", r"2\pi"),
        ("3 - 4", "4"),
        ("it is -4", "-4"),
        ("it is \u22124", "-4"),
        ("it costs $-3.50", "-3.50"),
        ("about 50%", "50%"),
        ("x1", "1"),
        ("1/2 of it", "1/2"),
        ("we need 3 1/2 cups", "3 1/2"),
        (r"so 3\frac{1}{2}", r"3\frac{1}{2}"),
        (r"gives -\frac{3}{4}", r"-\frac{3}{4}"),
        ("between 5 and 1,000,000 people", "1,000,000"),
        ("nothing here", None),
        ("", None),
        ("٣", None),  # digits of other scripts are not read
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_strict_extraction_needs_a_mark():
    assert extract_answer("the answer is 18", lenient=False) is None
    assert extract_answer("#### 18", lenient=False) == "18"


@pytest.mark.parametrize(
    "gold, completion, expected",
    [
        ("18", "#### 18", Part(1.0)),
        ("18", "#### 18.0", Part(1.0)),
        ("18", "#### 18.", Part(1.0)),
        ("18", "#### $18", Part(1.0)),
        ("18", "#### 19", Part(0.0, "wrong")),
        ("18", "nothing", Part(0.0, "no_answer")),
        ("1234", r"\boxed{1,234}", Part(1.0)),
        ("1234", r"\boxed{1{,}234}", Part(1.0)),
        ("0.5", r"\boxed{\frac{1}{2}}", Part(1.0)),
        ("0.5", r"\boxed{\dfrac12}", Part(1.0)),
        ("1/3", r"\boxed{0.333333}", Part(1.0)),
        ("1/3", r"\boxed{0.33}", Part(0.0, "wrong")),
        ("72", "She sold 48 + 24 = 72 clips.", Part(1.0)),
        ("... so 48 + 24 = 72\n#### 72", "The answer is 72", Part(1.0)),  # a whole solution as gold
        ("x^2+2x+1", r"\boxed{(x+1)^2}", Part(1.0)),
        ("5", r"\boxed{x=5}", Part(1.0)),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", Part(1.0)),
        ("41", r"\boxed{42}", Part(0.0, "wrong")),
        ("3628800", r"\boxed{10!}", Part(0.0, "too_complex")),
        ("1", r"\boxed{\int_0^1 x^{99} \sin(x) dx}", Part(0.0, "too_complex")),  # left to be worked out
        (r"\binom{5}{2}", r"\boxed{\binom{5}{3}}", Part(1.0)),  # the gold leaves it so too
        ("10!", r"\boxed{10!}", Part(1.0)),  # equal as text: nothing to compute
        ("3", r"\boxed{9^{9^{9}}}", Part(0.0, "too_complex")),
        ("3", r"\boxed{" + "(" * 30 + "3" + ")" * 30 + "}", Part(0.0, "too_complex")),
        ("3", r"\boxed{" + "1+" * 150 + "1}", Part(0.0, "too_long")),
        ("3", "9" * 200_000, Part(0.0, "too_long")),
        ("3", r"\boxed{" * 50_000, Part(0.0, "no_answer")),
        # what was asked, said again
        ("42", r"\boxed{17+25}", Part(0.0, "unfinished")),
        ("42", r"\boxed{6 \times 7}", Part(0.0, "unfinished")),
        ("42", r"\boxed{x=50-8}", Part(0.0, "unfinished")),
        ("42", "#### 84/2", Part(0.0, "unfinished")),
        ("42", r"\boxed{\frac{84}{2}}", Part(0.0, "unfinished")),
        ("42", r"\boxed{\sqrt{1764}}", Part(0.0, "unfinished")),
        ("1024", r"\boxed{2^{10}}", Part(0.0, "unfinished")),
        ("3/4", r"\boxed{\frac{1}{2}+\frac{1}{4}}", Part(0.0, "unfinished")),
        ("0.3", r"\boxed{0.1+0.2}", Part(0.0, "unfinished")),
        ("x=42", r"\boxed{17+25}", Part(0.0, "unfinished")),
        (r"42\text{ cm}", r"\boxed{6\cdot 7}", Part(0.0, "unfinished")),
        (r"50\%", r"\boxed{25+25}", Part(0.0, "unfinished")),
        ("x=42", r"\boxed{42}", Part(1.0)),
        (r"50\%", r"\boxed{\frac{1}{2}}", Part(1.0)),
        ("42", r"\boxed{17+25=42}", Part(1.0)),
        ("42", r"\boxed{f(3)=42}", Part(1.0)),
        ("42", r"\boxed{\frac{42}{1}}", Part(1.0)),
        ("42", r"\boxed{42^\circ}", Part(1.0)),
        ("42", r"\boxed{42\text{ cm}^2}", Part(1.0)),
        ("1500", r"\boxed{1.5\times 10^{3}}", Part(1.0)),
        ("1000000", r"\boxed{10^6}", Part(1.0)),
        ("1000", r"\boxed{10^{2}}", Part(0.0, "wrong")),
        ("1.5", r"\boxed{1\frac{1}{2}}", Part(1.0)),
        ("1.414214", r"\boxed{\sqrt{2}}", Part(1.0)),  # exact, for a gold answer that is rounded
        ("2^{10}", r"\boxed{1024}", Part(1.0)),
        # units, where both sides have one
        ("42 km", "#### 42 cm", Part(0.0, "unit")),
        ("42 km", "The way is 42 cm.", Part(0.0, "unit")),
        ("42 km", r"\boxed{42}\text{ cm}", Part(0.0, "unit")),
        (r"42\text{ km}", r"\boxed{42\,\mathrm{cm}}", Part(0.0, "unit")),
        (r"3\sqrt{2}\text{ m}", r"\boxed{3\sqrt{2}\text{ mm}}", Part(0.0, "unit")),
        (r"42\text{ cm}^2", r"\boxed{42\text{ cm}^3}", Part(0.0, "unit")),
        ("... so #### 42 m/s", "#### 42 km per hour", Part(0.0, "unit")),
        ("20 °C", "#### 20 °F", Part(0.0, "unit")),
        ("-4 km", "It is \u22124 cm.", Part(0.0, "unit")),
        ("-4 km", "In cm? It is \u22124.", Part(1.0)),
        ("18 cents", "#### 18 dollars", Part(0.0, "unit")),
        ("42 km", "It lies 42 kilometres away. It took hours.", Part(1.0)),
        (r"42\text{ cm}^2", "#### 42 square centimeters", Part(1.0)),
        ("42 km/h", r"\boxed{42\ \text{km/h}}", Part(1.0)),
        ("42 m", "It is 42 m in total.", Part(1.0)),
        ("42 m", "#### 42", Part(1.0)),
        ("42", "#### 42 m", Part(1.0)),
        ("42 apples", "#### 42 km", Part(1.0)),
        ("42 m", "#### 41", Part(0.0, "wrong")),
        ("42 m", "#### 17+25", Part(0.0, "unfinished")),
        (r"90^\circ", "#### 90 degrees", Part(1.0)),
        # the unit stands behind the answer, not behind a number like it
        ("5 meters", r"\boxed{5}. This took 15 minutes.", Part(1.0)),
        ("5 m", r"\boxed{5} m (500 cm)", Part(1.0)),
        ("5 meters", r"\boxed{5} (in meters)", Part(1.0)),
        ("-42 km", "\\boxed{\u221242} cm", Part(0.0, "unit")),
        # what is counted, or per what, may be left out
        (r"\$12 per hour", r"\boxed{12} dollars per hour", Part(1.0)),
        ("60 mph", r"\boxed{60} miles an hour", Part(1.0)),
        ("5 minutes", r"\boxed{5} minutes per day", Part(1.0)),
        # of two sides with a unit the one that was asked for
        ("5 m", r"\boxed{5\text{ m} = 500\text{ cm}}", Part(1.0)),
        ("500 cm", r"\boxed{5\text{ m} = 500\text{ cm}}", Part(1.0)),
        ("5 km", r"\boxed{5\text{ m} = 500\text{ cm}}", Part(0.0, "unit")),
        ("6 m", "#### 5 m = 6 m", Part(0.0, "several")),
        ("42 m", "#### 41 = 42 m", Part(0.0, "several")),
        # one unit in several spellings
        ("5 m^2", "#### 5 meters squared", Part(1.0)),
        ("5 cubic cm", "#### 5 centimeters squared", Part(0.0, "unit")),
        ("60 km/h", r"\boxed{60\ \frac{\text{km}}{\text{h}}}", Part(1.0)),
        ("60 m/s^2", r"\boxed{60 \frac{m}{s^2}}", Part(1.0)),
        ("60 km/h", r"\boxed{60 \frac{m}{s}}", Part(0.0, "unit")),
        # variables are no units
        ("-16t^2", r"\boxed{-16}", Part(0.0, "wrong")),
        ("3s^2", r"\boxed{3}", Part(0.0, "wrong")),
        ("2C", r"\boxed{2}", Part(0.0, "wrong")),
        ("5", r"\boxed{5K}", Part(0.0, "wrong")),
        ("6 s t", r"\boxed{6 t s}", Part(1.0)),
        # words behind a number, without a command around them
        ("18", "#### 18 eggs", Part(1.0)),
        ("18", "#### 18 bolts of fabric.", Part(1.0)),
        ("18", "<answer>18 years old</answer>", Part(1.0)),
        ("18", "#### 60 eggs/day", Part(0.0, "wrong")),
        ("18 eggs", r"\boxed{18\text{ eggs}}", Part(1.0)),
        ("18 eggs", "#### 19 eggs", Part(0.0, "wrong")),
        ("3/4", "#### 3/4 of the cake", Part(1.0)),
        ("3/4", r"\boxed{3/4\text{ cups}}", Part(1.0)),
        ("2 m", r"\boxed{2 meters long}", Part(1.0)),
        ("18", "#### 18 thousand", Part(0.0, "wrong")),
        ("18", "#### 18 hundreds", Part(0.0, "wrong")),
        ("18", "#### 18 hundredths", Part(0.0, "wrong")),
        ("18", "#### 18 divided by two", Part(0.0, "wrong")),
        ("18", "#### 18 squared", Part(0.0, "wrong")),
        ("18", r"\boxed{18 \sin x}", Part(0.0, "wrong")),
        ("3xyz", r"\boxed{3 xyz}", Part(1.0)),
        ("18", r"\boxed{\text{not }18}", Part(0.0, "wrong")),
        # a percentage with decimals, like one without, equals its number with and without the sign
        (r"12.5\%", r"\boxed{12.5}", Part(1.0)),
        (r"12.5\%", r"\boxed{0.125}", Part(1.0)),
        ("12.5", "#### 12.5%", Part(1.0)),
        ("12.5", r"\boxed{0.125}", Part(0.0, "wrong")),
        (r"25\%", r"\boxed{2.5\%}", Part(0.0, "wrong")),
        (r"25\%", r"\boxed{\frac{1}{4}}", Part(1.0)),
        # spelled with points
        ("3 p.m.", "#### 3 a.m.", Part(0.0, "unit")),
        ("3 PM", "#### 3 p.m.", Part(1.0)),
        (r"10:30\text{ a.m.}", r"\boxed{10:30} p.m.", Part(0.0, "unit")),
        (r"24\text{ sq. ft.}", r"\boxed{24\text{ sq. in.}}", Part(0.0, "unit")),
        (r"24\text{ sq. ft.}", r"\boxed{24\text{ square feet}}", Part(1.0)),
        # not equal to it, but compared with it
        *(("18", rf"\boxed{{{sign} 18}}", Part(0.0, "wrong")) for sign in COMPARISONS),
        (r"2\sqrt3", r"\boxed{\neq 2\sqrt3}", Part(0.0, "wrong")),
        (r"\geq 2", r"\boxed{\ge 2}", Part(1.0)),
        ("0.5", r"\boxed{P(X \geq 2) = 0.5}", Part(1.0)),
        # rounded, and what was rounded
        ("2.24", r"\boxed{\sqrt{5} \approx 2.24}", Part(1.0)),
        ("3.14", r"\boxed{\pi ≈ 3.14}", Part(1.0)),
        ("41", r"\boxed{41 \approx 42}", Part(0.0, "several")),
        # mixed numbers in plain text
        ("3.5", "The answer is 3 1/2.", Part(1.0)),
        ("0.5", "The answer is 3 1/2.", Part(0.0, "wrong")),
        ("3 1/2 cups", "#### 3.5 cups", Part(1.0)),
        ("-2.5", r"\boxed{-3\frac{1}{2}}", Part(0.0, "wrong")),
        # money and signs
        ("-18", "#### -$18", Part(1.0)),
        ("-18", "#### \u201318", Part(1.0)),
        ("18", "#### €18", Part(1.0)),
        ("1819", "#### 18€19", Part(0.0, "several")),
        # bold and code, as chat models write it
        ("18", "#### **18**", Part(1.0)),
        ("18", "<answer>`18`</answer>", Part(1.0)),
        ("18 km", "#### **18** cm", Part(0.0, "unit")),
        ("18", "#### $18/day", Part(1.0)),
        ("12.5", "#### 12.5 percent", Part(1.0)),
        ("0.1", r"\boxed{10\text{ percent}}", Part(1.0)),
        # the letter of a choice
        ("18", r"\boxed{\textbf{(A)}\ 18}", Part(1.0)),
        # two answers at once
        ("42", "<answer>41$ $42</answer>", Part(0.0, "several")),
        ("B", "<answer>A$ $B</answer>", Part(0.0, "several")),
        ("42", "<answer>The value is $42$</answer>", Part(1.0)),
        ("42", r"\boxed{41=42}", Part(0.0, "several")),
        ("42", r"\boxed{40=41=42}", Part(0.0, "several")),
        ("42", r"\boxed{41 := 42}", Part(0.0, "several")),
        ("42", r"\boxed{41 \rightarrow 42}", Part(0.0, "several")),
        ("42", "<answer>4\n2</answer>", Part(0.0, "several")),
        ("42", r"\boxed{4\,2}", Part(0.0, "several")),
        *(("12", rf"\boxed{{12{second}}}", Part(0.0, "several")) for second in SECOND_NUMBERS),
        *(("13", rf"\boxed{{12{second}}}", Part(0.0, "several")) for second in SECOND_NUMBERS),
        ("1.5", r"\boxed{1.5 \lor \sqrt{2}}", Part(0.0, "several")),
        ("12", r"\boxed{12_{10}}", Part(1.0)),
        ("12", r"\boxed{12_8}", Part(0.0, "several")),
        ("1010_2", r"\boxed{1010_3}", Part(0.0, "wrong")),
        ("1010_2", r"\boxed{1010}", Part(1.0)),
        ("12", r"\boxed{12\text{ apples}}", Part(1.0)),
        ("12", r"\boxed{12\text{ cm3}}", Part(1.0)),
        ("12", r"\boxed{\mathbf{12}}", Part(1.0)),
        ("1.5", r"\boxed{1\frac12}", Part(1.0)),
        ("0.707107", r"\boxed{\frac{\sqrt{2}}{2}}", Part(1.0)),
        ("9.424778", r"\boxed{3\pi}", Part(1.0)),
        ("1234567", r"\boxed{1\,234\,567}", Part(1.0)),
        ("1234567", "#### 1 234 567", Part(1.0)),
        # numbers that rounding to six decimals makes 0
        ("0.0000004", r"\boxed{0}", Part(0.0, "wrong")),
        ("0.0000004", r"\boxed{0.0000003}", Part(0.0, "wrong")),
        ("4e-7", r"\boxed{0.0000004}", Part(1.0)),
        ("0", r"\boxed{0.0000001}", Part(1.0)),
        # words are no products of letters
        ("act", "<answer>cat</answer>", Part(0.0, "wrong")),
        ("cat", "<answer>Cat</answer>", Part(1.0)),
        ("Yes", r"\boxed{\text{yes}}", Part(1.0)),
    ],
)
def test_verdicts(verifier, gold, completion, expected):
    assert verifier.score([completion], [gold]) == [expected]


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("55", "a_{20} = 55"),
        ("5050", "S_{100}=5050"),
        ("3", "x_{12}=3"),
        ("10", "C(5,2) = 10"),
        ("0.5", "P(X=2)=0.5"),
        ("45", r"m\angle 1 = 45^\circ"),
        (r"90^\circ", r"m\angle 1 = 90^\circ"),
        ("16", "A = s^2 = 16"),
        ("78.5", r"A = \pi r^2 = 78.5"),
        ("2.080084", r"\sqrt[3]{9}"),
        ("3.236068", r"x=1+\sqrt 5"),
        ("9.8", r"9.8\,\mathrm{m\,s^{-2}}"),
        ("5 m", r"5\text{ m} = 5\text{ m}"),
        ("11", "1011_2=11_{10}"),
        (r"\$3", r"300 cents = \$3"),
        ("7", r"7\text{ (out of 10)}"),
        ("3", r"3\text{ (mod 7)}"),
        ("42", r"42=6\cdot 7"),
        ("42", "x=42=17+25"),
        ("3", r"\log_2 8=3"),
        ("42", r"\sqrt{1764}=42"),
        ("10", r"\binom{5}{2}=10"),
        ("5", "f^{-1}(3)=5"),
        ("120", "5!=120"),
        ("5", r"10\% \times 50 = 5"),
        ("1/2", r"50\%=\frac12"),
        ("0.5", r"0.5=50\%"),
        ("3.142857", r"\frac{22}{7}=3.142857"),
        ("12 N m", r"12\text{ N m}"),
        ("12 N m", r"12\mathrm{~N}\,\mathrm{m}"),
        ("12 N m", "12"),
        (r"12\text{ N m}", "12 N m"),
        (r"2\frac{km}{h}", "2"),
        (r"2\frac{\text{km}}{\text{h}}", "2"),
        (r"2\frac{m}{s^2}", "2"),
        (r"\$5", r"\$5\text{ dollars}"),
        ("1500", r"1500=1.5\times 10^3"),
        ("42", r"\text{Area of } ABC = 42"),
        ("0.5", r"P(X \geq 2) = 0.5"),
        ("-1.5", r"-\frac{3}{2}"),
        ("-1.5", r"-\frac32\text{ cm}"),
        ("3", r"\gcd(12,15)=3"),
        ("13", r"5+8=13\text{ apples}"),
        ("4", "|{-4}|=4"),
        ("42", r"x\equiv 42\pmod{50}"),
        ("42", r"42\pmod{50}"),
        ("113.1", r"V=\frac{4}{3}\pi r^3 = 113.1"),
        ("5", "f'(1)=5"),
        ("42", r"\text{lcm}(6,14)=42"),
        ("42", r"\$100 - \$58 = \$42"),
        ("42", r"6\text{ oranges}\times 7=42"),
    ],
)
def test_numbers_that_only_name_or_count_are_no_answers(verifier, gold, answer):
    """Indices, exponents, arguments, sums and conversions beside the one answer, and units in several spellings."""
    assert verifier.score([rf"\boxed{{{answer}}}"], [gold]) == [Part(1.0)]


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("12", r"12 \lor 13"),
        ("12", r"12\text{ or 13}"),
        ("12", r"12\\13"),
        ("12", "12~13"),
        ("12", "12_8"),
        ("12", r"12\dots,13"),
        ("12", r"12\iff 13"),
        ("1.5", r"1.5=\sqrt2"),
        ("1.5", r"1.5=\sqrt{2}"),
        ("1.414214", r"1.5=\sqrt{2}"),
        ("12", "x_{12}=13"),
        ("1010_2", "1010_3"),
        ("13", "12=13"),
        ("12", "12=13"),
        ("12", "12=(13)"),
        ("13", r"12\text{ out of 13}"),
        ("13", r"12\text{ (mod 13)}"),
        ("13", r"12\pmod{13}"),
        ("2", r"9.8\,\mathrm{m\,s^{-2}}"),
        ("13", r"f(13)=12"),
        ("12", r"\text{12 out of 13} = 13"),
        ("13", "(12)=13"),
        ("13", "x=12y=13"),
        ("13", "x=12, y=13"),
        ("13", r"x=12\lor x=13"),
        ("13", r"x=12\text{ or }x=13"),
        ("13", "12;x=13"),
        ("13", r"12\text{ or }x=13"),
        ("13", r"\text{12 or }x=13"),
        ("13", "x=12~x=13"),
        ("13", r"x=12\\x=13"),
        ("13", r"12\text{ apples}=13"),
        ("13", "12 apples = 13"),
        ("13", r"12^\circ=13"),
        ("13", "12_{10}=13"),
        (r"2\frac{F}{m}", "2"),
        (r"12\frac{s}{t}", "12"),
        (r"2\frac{h}{t}", "2"),
        (r"3\frac{V}{s}", "3"),
        (r"\frac12\frac{m}{g}", r"\frac12"),
        ("42", r"\frac{41}{1}\lor 42"),
        ("41", r"41\lor\frac{42}{1}"),
        ("41", r"41\cup\frac{42}{1}"),
        ("1.5", r"1.5|\sqrt{2}"),
        ("1.5", r"1.5||\sqrt{2}"),
        ("12", r"12\text{ or 3}"),
        ("12", r"12\text{ (or 13)}"),
        ("42", r"41\%=42\%"),
        ("13", r"\frac{24}{2}\lor x=13"),
        ("13", "12 or x=13"),
        ("42 m", "41 = 42 m"),
        ("42", "41 m = 42"),
        ("6 m", "5 m = 6 m"),
        (r"\$3", r"\$2=\$3"),
        ("13", "12 or 14 = 13"),
        ("12", r"12=x\lor13"),
        ("x=42", "x=41=42"),
        ("13", r"12\text{ or }x+1=13"),
        ("13", r"12\$\$13=13"),
        ("13", r"x=12\text{ and }y+1=13"),
    ],
)
def test_a_second_guess_or_another_answer_is_not_paid(verifier, gold, answer):
    assert verifier.score([rf"\boxed{{{answer}}}"], [gold])[0].value == 0.0


def test_a_batch_keeps_its_order(verifier):
    completions = [r"\boxed{x+x}", "#### 4", "", r"\boxed{y}", "#### 5", r"\boxed{2x}"]
    golds = ["2x", "4", "1", "2x", "4", "2x"]
    assert [part.value for part in verifier.score(completions, golds)] == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


@settings(deadline=None, max_examples=400)
@given(ANY_TEXT | MATHS)
@example("\ud800 7")
@example("\\boxed{" + "{" * 300)
@example("7" + "\u0301" * 500)
def test_extraction_never_raises_and_is_short(text):
    for lenient in (True, False):
        answer = extract_answer(text, lenient)
        assert answer is None or (answer and len(answer) <= 1000)


@settings(deadline=None, max_examples=400)
@given(ANY_TEXT | MATHS, ANY_TEXT | MATHS)
def test_the_exact_stage_never_raises(gold, answer):
    assert compare_fast(normalise(gold), normalise(answer)) in (True, False, None)
    assert set(unit(answer)[1]) <= set("".join(UNITS.values()) + "23")
    assert too_complex(answer) in (True, False)


@settings(deadline=None, max_examples=300)
@given(st.fractions(), st.integers(0, 12))
def test_numbers_are_read_exactly(value, places):
    sign = "-" if value < 0 else ""
    top, bottom = abs(value.numerator), value.denominator
    for text in (f"{sign}{top}/{bottom}", f"{sign}\\frac{{{top}}}{{{bottom}}}", f"{sign}{top:,}/{bottom}"):
        if len(text) <= 200:
            assert number(normalise(text)) == (value, False)
    decimal = f"{sign}{top}.{'0' * (places + 1)}"
    assert number(decimal) == (Fraction(sign + str(top)), True)


@settings(deadline=None, max_examples=300)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_two_integers_are_equal_only_to_themselves(left, right):
    assert compare_fast(str(left), normalise(f"{right:,}")) is (left == right)


@pytest.mark.parametrize(
    "text", ["1e400", "1" * 300, "0/0", "1/0", "\\frac{1}{0}", "--1", "1,23", "1.2.3", "", "-", "٣"]
)
def test_what_is_not_a_plain_number(text):
    assert number(normalise(text)) is None


@settings(deadline=None, max_examples=60)
@given(ANY_TEXT | MATHS, ANY_TEXT | MATHS)
def test_no_text_raises(verifier, completion, gold):
    (part,) = verifier.score([completion], [gold])
    assert part.value in (0.0, 1.0)
