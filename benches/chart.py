"""A chart of times against sizes on logarithmic axes: numbers in, the text of an SVG out."""

import math

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 84, 150, 78, 64
COLOURS = ("#1f77b4", "#d94f00", "#2e8b57", "#8a2be2")
INK, FAINT, GRID = "#222222", "#666666", "#e2e2e2"


def log_log(title, caption, x_label, y_label, lines):
    """`lines` is a list of (name, [(x, y), ...]), everything above 0."""
    points = [point for _, line in lines for point in line]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    decades = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    low = max([tick for tick in ticks if tick <= min(ys)])
    high = min([tick for tick in ticks if tick >= max(ys)])

    def place(value, low, high, start, end):
        return start + (end - start) * math.log(value / low) / (math.log(high / low) or 1.0)

    across = lambda x: place(x, xs[0], xs[-1], LEFT + 12, WIDTH - RIGHT)
    down = lambda y: place(y, low, high, HEIGHT - BOTTOM, TOP)
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 32, title, size=20, colour=INK),
        text(LEFT, 54, caption, size=13, colour=FAINT),
    ]
    for tick in ticks:
        if low <= tick <= high:
            y = down(tick)
            svg.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
            svg.append(text(LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    for x in xs:
        svg.append(f'<path d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        svg.append(text(across(x), HEIGHT - BOTTOM + 20, f"{x:g}", anchor="middle"))
    svg.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, x_label, anchor="middle", colour=INK))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    svg.append(text(24, middle, y_label, anchor="middle", colour=INK, more=f'transform="rotate(-90 24 {middle:.0f})"'))
    # Names stand at the ends of their lines, below each other where these meet.
    ends = sorted((down(line[-1][1]), name) for name, line in lines if line)
    heights, last = {}, -math.inf
    for y, name in ends:
        last = heights[name] = max(y, last + 18)
    for (name, line), colour in zip(lines, COLOURS):
        if not line:
            continue
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        svg += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in line]
        svg.append(text(across(line[-1][0]) + 10, heights[name] + 4, name, size=14, colour=colour))
    return "\n".join([*svg, "</svg>"]) + "\n"


def text(x, y, words, size=12, anchor="start", colour=FAINT, more=""):
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" {more}>{escaped}</text>'
