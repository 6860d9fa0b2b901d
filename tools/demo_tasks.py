"""Small programming tasks written for the demo checkpoint, so that its chat knows the first things people ask for.

They are trained on, and the model card says so: an answer to one of these is remembered, not reasoned.
"""

TASKS = {
    "is_prime": ("checks whether a number is prime", """
def is_prime(n):
    if n < 2:
        return False
    for i in range(2, int(n ** 0.5) + 1):
        if n % i == 0:
            return False
    return True"""),
    "factorial": ("computes the factorial of a number", """
def factorial(n):
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result"""),
    "fibonacci": ("returns the n-th Fibonacci number", """
def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a"""),
    "reverse_string": ("reverses a string", """
def reverse_string(text):
    return text[::-1]"""),
    "is_palindrome": ("checks whether a string is a palindrome", """
def is_palindrome(text):
    text = text.lower()
    return text == text[::-1]"""),
    "gcd": ("computes the greatest common divisor of two numbers", """
def gcd(a, b):
    while b:
        a, b = b, a % b
    return a"""),
    "add": ("adds two numbers", """
def add(a, b):
    return a + b"""),
    "multiply": ("multiplies two numbers", """
def multiply(a, b):
    return a * b"""),
    "maximum": ("returns the largest number in a list", """
def maximum(numbers):
    largest = numbers[0]
    for number in numbers:
        if number > largest:
            largest = number
    return largest"""),
    "minimum": ("returns the smallest number in a list", """
def minimum(numbers):
    smallest = numbers[0]
    for number in numbers:
        if number < smallest:
            smallest = number
    return smallest"""),
    "total": ("returns the sum of a list of numbers", """
def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result"""),
    "mean": ("computes the mean of a list of numbers", """
def mean(numbers):
    return sum(numbers) / len(numbers)"""),
    "is_even": ("checks whether a number is even", """
def is_even(n):
    return n % 2 == 0"""),
    "is_odd": ("checks whether a number is odd", """
def is_odd(n):
    return n % 2 == 1"""),
    "count_words": ("counts the words in a text", """
def count_words(text):
    return len(text.split())"""),
    "count_vowels": ("counts the vowels in a string", """
def count_vowels(text):
    return sum(1 for char in text.lower() if char in 'aeiou')"""),
    "read_lines": ("reads a file and returns its lines", """
def read_lines(path):
    with open(path) as file:
        return file.read().splitlines()"""),
    "write_text": ("writes a text to a file", """
def write_text(path, text):
    with open(path, 'w') as file:
        file.write(text)"""),
    "load_json": ("loads a JSON file", """
import json

def load_json(path):
    with open(path) as file:
        return json.load(file)"""),
    "unique": ("removes the duplicates from a list and keeps the order", """
def unique(items):
    seen = set()
    result = []
    for item in items:
        if item not in seen:
            seen.add(item)
            result.append(item)
    return result"""),
    "flatten": ("flattens a list of lists", """
def flatten(lists):
    return [item for items in lists for item in items]"""),
    "bubble_sort": ("sorts a list with bubble sort", """
def bubble_sort(items):
    for i in range(len(items)):
        for j in range(len(items) - 1 - i):
            if items[j] > items[j + 1]:
                items[j], items[j + 1] = items[j + 1], items[j]
    return items"""),
    "binary_search": ("finds an item in a sorted list by binary search", """
def binary_search(items, target):
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1"""),
    "square": ("returns the square of a number", """
def square(x):
    return x * x"""),
    "count_lines": ("counts the lines of a file", """
def count_lines(path):
    with open(path) as file:
        return sum(1 for line in file)"""),
    "merge": ("merges two dictionaries", """
def merge(first, second):
    result = dict(first)
    result.update(second)
    return result"""),
    "celsius_to_fahrenheit": ("converts Celsius to Fahrenheit", """
def celsius_to_fahrenheit(celsius):
    return celsius * 9 / 5 + 32"""),
    "char_counts": ("counts how often each character occurs in a string", """
def char_counts(text):
    counts = {}
    for char in text:
        counts[char] = counts.get(char, 0) + 1
    return counts"""),
}  # fmt: skip
"""name → (what it does, in the third person; its code)."""
