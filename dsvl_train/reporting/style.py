"""The page's style sheet and script, inlined so that the report is one file. Colours keep their contrast in light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #faf9f6; --card: #ffffff; --ink: #22262b; --muted: #656b73; --rule: #e4e1da; --grid: #eeece7;
  --band: rgba(34, 38, 43, .035); --mat: #f1f0ec;
  --text: #2a6db0; --multimodal: #c45f12; --good: #23774a; --part: #946200; --bad: #b3342c;
  --c1: #2a6db0; --c2: #c45f12; --c3: #1f8072; --c4: #7a56a8; --c5: #8f7400; --c6: #b0437a;
  --over: 196, 95, 18; --under: 42, 109, 176; --mark: #d9efd9;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, "Noto Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1c1f23; --ink: #e4e2dc; --muted: #9aa0a8; --rule: #31353b; --grid: #282c31;
    --band: rgba(255, 255, 255, .03); --mat: #292d33;
    --text: #6fabe8; --multimodal: #f0934a; --good: #6cc792; --part: #dcae4b; --bad: #f08277;
    --c1: #6fabe8; --c2: #f0934a; --c3: #55c0ae; --c4: #b394e0; --c5: #d1b548; --c6: #e684b4;
    --over: 240, 147, 74; --under: 111, 171, 232; --mark: #27472f;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--sans); font-variant-numeric: tabular-nums; }
main, header, footer, nav > div { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; padding-bottom: 22px; }
h1, h2 { font-family: var(--serif); font-weight: 600; letter-spacing: -.012em; line-height: 1.15; margin: 0; text-wrap: balance; }
h1 { font-size: 38px; }
h2 { font-size: 26px; }
h3 { font-size: 13px; font-weight: 600; color: var(--muted); margin: 30px 0 10px; }
header p { color: var(--muted); margin: 10px 0 0; max-width: 68ch; }
section { padding: 40px 0 12px; }
section > p.lead { color: var(--muted); margin: 8px 0 0; max-width: 80ch; }
header + main > section:first-child { padding-top: 6px; }
.plain td.number { width: 1%; padding-right: 12px; font-weight: 400; color: var(--muted); }
.plain td.number + td { text-align: left; padding-left: 0; font-weight: 600; }
.plain th.number + th { text-align: left; padding-left: 0; }
footer { color: var(--muted); font-size: 13px; padding-top: 28px; padding-bottom: 48px; }
nav { position: sticky; top: 0; z-index: 5; background: var(--page); border-bottom: 1px solid var(--rule); }
nav > div { display: flex; gap: 22px; overflow-x: auto; white-space: nowrap; scrollbar-width: none; }
nav a { color: var(--muted); text-decoration: none; padding: 11px 0 10px; border-bottom: 2px solid transparent; font-size: 14px; }
nav a:hover, nav a:focus-visible { color: var(--ink); border-color: var(--ink); }
.text { --c: var(--text); } .multimodal { --c: var(--multimodal); } .muted { --c: var(--muted); } .ink { --c: var(--ink); }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }

.scores { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 1px; margin: 22px 0 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.scores div { background: var(--card); padding: 16px 18px 14px; }
.scores b { display: block; font-family: var(--serif); font-size: 34px; font-weight: 600; line-height: 1.1; letter-spacing: -.02em; }
.scores span { display: block; font-weight: 600; margin-bottom: 6px; overflow-wrap: anywhere; }
.scores small { display: block; color: var(--muted); font-size: 13px; margin-top: 4px; }

.table-box { overflow-x: auto; margin-top: 18px; }
table.plain { border-collapse: collapse; width: 100%; font-size: 14px; }
.plain th { text-align: right; font-weight: 500; color: var(--muted); padding: 6px 0 6px 16px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; vertical-align: bottom; }
.plain td { text-align: right; padding: 7px 0 7px 16px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
.plain th:first-child, .plain td:first-child { text-align: left; padding-left: 0; }
.plain td:first-child { font-weight: 600; }
.plain small { color: var(--muted); font-weight: 400; font-size: 13px; }

.facts { display: flex; flex-wrap: wrap; gap: 6px 26px; margin: 14px 0 0; font-size: 14px; }
.facts div { display: flex; gap: 7px; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px; }
.grid > .chart:first-child:nth-last-child(odd) { grid-column: 1 / -1; }

.after-table { margin-top: 24px; }
figure { margin: 0; }
.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 18px 10px; min-width: 0;
  display: flex; flex-direction: column; }
.chart.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 8px; align-items: baseline; font-size: 14px; margin-bottom: 12px; min-height: 21px; }
figcaption b { font-weight: 600; }
.unit { color: var(--muted); font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-left: auto; font-size: 13px; }
.key { white-space: nowrap; }
.key i { display: inline-block; vertical-align: middle; width: 16px; border-top: 2px solid var(--c); margin: -2px 6px 0 0; }
.key.block i { width: 8px; height: 8px; border: 0; background: var(--c); }
.key.thin i { border-top-width: 1px; }
.key.dash i { border-top: 2px dashed var(--c); }
.key.dots i, .key.points i { width: 6px; height: 6px; border: 0; border-radius: 50%; background: var(--c); }
.plot { position: relative; height: 210px; border-bottom: 1px solid var(--rule); margin: 0 2px 0 42px; touch-action: pan-y; }
.wide .plot { height: 250px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }
path.grid { stroke: var(--grid); stroke-width: 1; }
path.reference { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 4; }
path.line { stroke: var(--c); stroke-width: 2; }
path.thin { stroke: var(--c); stroke-width: 1; opacity: .55; }
path.dash { stroke: var(--c); stroke-width: 1.5; stroke-dasharray: 5 5; }
path.dots { stroke: var(--c); stroke-width: 4; opacity: .32; }
path.dots.few { stroke-width: 5; opacity: .6; }
path.points { stroke: var(--c); stroke-width: 7; }
path.dots.many { stroke-width: 2.5; opacity: .25; }
rect.band { fill: var(--band); }
.y-tick, .x-tick, .x-label, .reference-label, .band-label { color: var(--muted); font-size: 12px; line-height: 16px; white-space: nowrap; }
.y-tick, .x-tick, .reference-label, .band-label { position: absolute; }
.y-tick { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.x-tick { top: 100%; margin-top: 4px; transform: translateX(-50%); }
.reference-label { right: 2px; transform: translateY(-100%); }
.has-bands { margin-top: 20px; }
.band-label { bottom: 100%; margin-bottom: 3px; padding-left: 1px; overflow: hidden; text-overflow: ellipsis; }
.x-label { margin: 22px 2px 0 42px; text-align: right; line-height: 14px; }
.plot svg.strip { inset: auto; top: calc(100% + 4px); height: 8px; }
.strip rect { fill: var(--c); shape-rendering: crispEdges; }
.has-strip .x-tick { margin-top: 16px; }
.has-strip + .x-label { margin-top: 34px; }
.note { color: var(--muted); font-size: 13px; line-height: 1.4; margin: 8px 0 4px; max-width: 75ch; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--muted); pointer-events: none; }
.tip { position: absolute; top: 4px; z-index: 3; background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 6px 10px; font-size: 12px; line-height: 1.5; pointer-events: none; white-space: nowrap;
  box-shadow: 0 3px 14px rgba(0, 0, 0, .14); }
.tip b { font-weight: 600; }
.tip i { display: inline-block; width: 8px; height: 8px; border-radius: 50%; background: var(--c); margin-right: 6px; }

.bars { display: flex; align-items: stretch; height: 232px; padding-top: 18px; margin: 0 2px 0 6px; }
.bar { flex: 1; min-width: 0; display: flex; flex-direction: column; justify-content: flex-end; text-align: center; font-size: 12px; }
.bar { position: relative; padding: 0 3px 20px; }
.bar i { display: block; background: var(--c3); border-radius: 3px 3px 0 0; min-height: 1px; position: relative; margin: 0 auto;
  width: 100%; max-width: 56px; font-style: normal; }
.bar b { position: absolute; bottom: 100%; left: -20px; right: -20px; font-weight: 400; margin-bottom: 2px; }
.bar span { position: absolute; bottom: 0; left: 0; right: 0; color: var(--muted); border-top: 1px solid var(--rule); padding-top: 2px; }
.bars + .x-label { margin-top: 2px; }
.heat-box { overflow-x: auto; flex: 1; display: flex; }
.heat { border-collapse: separate; border-spacing: 2px; width: 100%; table-layout: fixed; font-size: 12px; }
.heat th { font-weight: 400; color: var(--muted); padding: 0; font-size: 12px; overflow: visible; white-space: nowrap; }
.heat tbody th, .heat tfoot th:first-child { width: 62px; text-align: left; }
.heat td { text-align: center; height: 26px; padding: 0; border-radius: 3px; }
.heat.fine { border-spacing: 1px 2px; }
.heat.fine td { border-radius: 1px; }
.heat-box + .x-label { margin-top: 0; }
.ramp { display: inline-flex; align-items: center; gap: 6px; margin-left: auto; font-size: 12px; color: var(--muted); }
.ramp i { width: 34px; height: 9px; border-radius: 2px;
  background: linear-gradient(to right, rgba(var(--under), .8), rgba(var(--under), 0)); }
.ramp i ~ i { background: linear-gradient(to right, rgba(var(--over), 0), rgba(var(--over), .8)); }

.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px; }
.examples.tiny { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.tiny .image { height: 122px; }
.examples.large { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.example { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; display: flex;
  flex-direction: column; }
.example .image { background: var(--mat); display: flex; align-items: center; justify-content: center; height: 150px; padding: 12px; }
.large .image { height: auto; min-height: 120px; }
.example img { max-width: 100%; max-height: 100%; object-fit: contain; }
.large img { max-height: 240px; }
.example img.small { image-rendering: pixelated; width: auto; height: 96px; }
.example .missing { color: var(--muted); font-size: 12px; overflow-wrap: anywhere; text-align: center; }
.example div.words { padding: 11px 14px 13px; font-size: 14px; line-height: 1.4; overflow-wrap: anywhere; }
.example p { margin: 0; white-space: pre-wrap; max-height: 8.4em; overflow-y: auto; }
.question { color: var(--muted); margin-bottom: 7px !important; }
.answer { font-weight: 600; }
.answer::before { margin-right: 7px; }
.good .answer { color: var(--good); } .good .answer::before { content: "\\2713"; }
.part .answer { color: var(--part); } .part .answer::before { content: "\\223C"; }
.bad .answer { color: var(--bad); } .bad .answer::before { content: "\\2717"; }
.answer del { text-decoration: underline wavy 1px; text-underline-offset: 3px; }
.truth { margin-top: 4px !important; }
h4 { font-size: 14px; font-weight: 600; margin: 22px 0 10px; }
p.note.first { margin: 0 0 10px; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 14px; align-items: start; }
.sample { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.sample p { margin: 0; padding: 10px 14px; }
.sample .of { font-size: 13px; color: var(--muted); }
.sample .of b { color: var(--ink); margin-right: 6px; }
.sample .images { background: var(--mat); display: flex; flex-wrap: wrap; gap: 12px; align-items: center; justify-content: center;
  padding: 12px; }
.sample img { max-width: 100%; max-height: 320px; object-fit: contain; }
.sample .missing { color: var(--muted); font-size: 12px; overflow-wrap: anywhere; }
.sample img.small { image-rendering: pixelated; height: 96px; }
.spans { font-size: 14px; line-height: 1.6; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22em; overflow-y: auto; }
mark { background: var(--mark); color: inherit; border-radius: 2px; padding: 1px 0; }
.special, .image-tokens { font: 12px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; color: var(--muted);
  border: 1px solid var(--rule); border-radius: 4px; padding: 0 3px; }
mark.special { color: var(--ink); border-color: transparent; }
.image-tokens { color: var(--multimodal); border-color: currentColor; }
.left-out { color: var(--muted); }

.answers th, .answers td, .answers th:first-child { text-align: left; vertical-align: middle; white-space: normal; }
.answers td { min-width: 96px; max-width: 260px; overflow-wrap: anywhere; }
.answers td:first-child { font-weight: 400; }
.answers td.picture { min-width: 0; width: 1%; }
.answers td.picture img { display: block; max-width: 120px; max-height: 72px; object-fit: contain; }
.answers td.picture img.small { image-rendering: pixelated; height: 48px; }
.answers .missing { color: var(--muted); font-size: 12px; }
.truth span, .empty { color: var(--muted); font-weight: 400; }
@media (max-width: 860px) {
  .grid { grid-template-columns: minmax(0, 1fr); }
  main, header, footer, nav > div { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 30px; }
  h1 { font-size: 30px; }
  .chart { padding: 12px 12px 8px; }
  .legend { margin-left: 0; width: 100%; }
  .key { white-space: normal; overflow-wrap: anywhere; }
  .ramp { margin-left: 0; }
}
@media print { nav { display: none; } .chart, .example { break-inside: avoid; } }
"""

JS = """
(() => {
  const figures = JSON.parse(document.getElementById('figures').textContent);
  const plain = v => Math.abs(v) >= 1000 ? v.toLocaleString('en', {maximumFractionDigits: 1}) : String(+v.toPrecision(5));
  const element = (name, parent, look) => Object.assign(parent.appendChild(document.createElement(name)), {className: look});
  for (const plot of document.querySelectorAll('[data-figure]')) {
    const figure = figures[plot.dataset.figure];
    const maps = figure.series.map(s => new Map(s.x.map((x, i) => [x, s.y[i]])));
    const steps = [...new Set(figure.series.flatMap(s => s.x))].sort((a, b) => a - b);
    let cursor = null, tip = null;
    const leave = () => { cursor?.remove(); tip?.remove(); cursor = tip = null; };
    const nearest = x => {
      let low = 0, high = steps.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; steps[middle] < x ? low = middle : high = middle; }
      return x - steps[low] < steps[high] - x ? steps[low] : steps[high];
    };
    plot.addEventListener('pointerleave', leave);
    plot.addEventListener('pointermove', event => {
      const box = plot.getBoundingClientRect(), [first, last] = figure.x;
      const step = nearest(first + (event.clientX - box.left) / box.width * (last - first));
      const at = (step - first) / (last - first);
      if (!cursor) { cursor = element('div', plot, 'cursor'); tip = element('div', plot, 'tip'); }
      cursor.style.left = 100 * at + '%';
      tip.replaceChildren();
      element('b', tip, '').textContent = figure.x_label + ' ' + step.toLocaleString('en', {maximumFractionDigits: 10});
      figure.series.forEach((series, index) => {
        const value = maps[index].get(step);
        if (value == null) return;
        const line = element('div', tip, series.colour);
        element('i', line, '');
        line.append(series.name + ' ' + (figure.share ? plain(100 * value) + '%' : plain(value)));
      });
      tip.style.left = at < .5 ? 'calc(' + 100 * at + '% + 10px)' : 'auto';
      tip.style.right = at < .5 ? 'auto' : 'calc(' + 100 * (1 - at) + '% + 10px)';
    });
  }
})();
"""
