"use strict";
(function () {
  // Reads values back from the drawn paths, so the page carries every curve once; without this script nothing is lost but the read-out.
  var tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);

  function points(path) {
    return (path.getAttribute("d").match(/[ML][^ML]+/g) || []).map(function (part) {
      return part.slice(1).split(" ").map(Number);
    });
  }

  function show(value) {
    return Math.abs(value) < 1e-3 && value !== 0 || Math.abs(value) >= 1e5 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  document.querySelectorAll("svg.chart").forEach(function (svg) {
    var h = svg.dataset.x.split(" ").map(Number), v = svg.dataset.y.split(" ").map(Number), curves = null;
    var rule = document.createElementNS(svg.namespaceURI, "path");
    rule.setAttribute("class", "rule");
    svg.appendChild(rule);

    function leave() { tip.hidden = true; rule.removeAttribute("d"); }

    function move(event) {
      var box = svg.getBoundingClientRect(), at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      if (at < h[0] - 8 || at > h[1] + 8) { leave(); return; }
      curves = curves || Array.from(svg.querySelectorAll("path[data-name]")).map(function (path) {
        return { name: path.dataset.name, slot: path.parentNode.getAttribute("class"), points: points(path) };
      });
      tip.textContent = "";
      var head = document.createElement("b"), nearest = null;
      tip.appendChild(head);
      curves.forEach(function (curve) {
        var best = null;
        curve.points.forEach(function (p) { if (!best || Math.abs(p[0] - at) < Math.abs(best[0] - at)) best = p; });
        if (!best) return;
        if (nearest === null || Math.abs(best[0] - at) < Math.abs(nearest - at)) nearest = best[0];
        var share = (best[1] - v[0]) / (v[1] - v[0]);
        var value = v[4] ? Math.pow(10, Math.log10(v[2]) + share * (Math.log10(v[3]) - Math.log10(v[2]))) : v[2] + share * (v[3] - v[2]);
        var row = document.createElement("span");
        row.className = curve.slot;
        row.textContent = curve.name + " \u2248 " + show(value);
        tip.appendChild(row);
      });
      if (nearest === null) { leave(); return; }
      head.textContent = "step " + Math.round(h[2] + (nearest - h[0]) / (h[1] - h[0]) * (h[3] - h[2]));
      rule.setAttribute("d", "M" + nearest + " " + v[1] + "V" + v[0]);
      tip.hidden = false;
      var left = event.clientX + 16;
      if (left + tip.offsetWidth > window.innerWidth - 8) left = event.clientX - tip.offsetWidth - 16;
      tip.style.left = Math.max(8, left) + "px";
      tip.style.top = Math.max(8, Math.min(event.clientY - 12, window.innerHeight - tip.offsetHeight - 8)) + "px";
    }

    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", leave);
  });

  // Images of a prompt are enlarged together, side by side; without this script they stay as they are.
  var shown = document.createElement("dialog"), leaveButton = document.createElement("button"), large = document.createElement("div"), words = document.createElement("p");
  shown.setAttribute("aria-label", "Enlarged images");
  leaveButton.textContent = "Close";
  large.className = "large";
  shown.append(leaveButton, words, large);
  document.body.appendChild(shown);
  leaveButton.addEventListener("click", function () { shown.close(); });
  shown.addEventListener("click", function (event) { if (event.target === shown) shown.close(); });

  function enlarge(image) {
    var figure = image.closest("figure"), caption = figure.querySelector("figcaption");
    words.textContent = caption ? caption.textContent : image.alt;
    large.textContent = "";
    Array.from(image.closest(".pair, .row").children).forEach(function (cell) {
      var copy = cell.cloneNode(true), frames = copy.querySelector(".frames");
      if (frames) frames.remove();
      copy.querySelectorAll("img").forEach(function (img) {
        ["role", "tabindex"].forEach(function (name) { img.removeAttribute(name); });
        img.loading = "eager";
        if (img.width < 200) img.classList.add("tiny");
        img.removeAttribute("width"); img.removeAttribute("height");
      });
      large.appendChild(copy);
    });
    large.style.setProperty("--shown", large.children.length);
    shown.showModal();
  }

  document.querySelectorAll(".pair img, .timeline .row img").forEach(function (image) {
    if (image.closest(".frames")) return;
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    image.addEventListener("click", function () { enlarge(image); });
    image.addEventListener("keydown", function (event) {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(image); }
    });
  });

  // Only what scrolls is a stop for the Tab key.
  function stops() {
    document.querySelectorAll(".scroll").forEach(function (box) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    });
  }
  stops();
  window.addEventListener("resize", stops);
  document.querySelectorAll("details").forEach(function (fold) { fold.addEventListener("toggle", stops); });

  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (fold) { fold.open = true; });
  });
}());
